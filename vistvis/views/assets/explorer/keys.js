// The keyboard: every key, what it does, and the help that says so.

import { button, element } from "./dom.js";

export const KEYS = [
  ["← ↑ → ↓", "move the query; Shift: five patches"],
  ["[ ]", "head before, head after (mean and max too)"],
  ["{ }", "site before, site after"],
  [", .", "frame before, frame after"],
  ["t", "next special token of the frame; again: back to the patch"],
  ["p", "pin the query, or let it go"],
  ["Escape", "let all pins go"],
  ["d", "direction: attends to, attended by"],
  ["s", "smooth or raw patches"],
  ["n", "next scale: auto, linear, log, percentile"],
  ["h, m", "all heads, all sites as small maps"],
  ["+ −", "frames larger, smaller (or Ctrl and the wheel)"],
  ["?", "this help"],
];

/** A dialog with all keys. */
export function helpDialog() {
  const rows = KEYS.map(([keys, text]) =>
    element("tr", {}, element("th", { scope: "row" }, element("kbd", {}, keys)), element("td", {}, text)));
  const dialog = element("dialog", { class: "help", "aria-label": "Keyboard" });
  dialog.append(element("h2", {}, "Keyboard"), element("table", {}, ...rows),
    button("Close", () => dialog.close()));
  return dialog;
}

const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

/** What a key means: `act` has a function for each. True where the key was one of ours. */
export function pressed(event, act) {
  if (event.ctrlKey || event.metaKey || event.altKey) return false;
  const typed = event.target.closest?.("input, select, textarea, dialog");
  if (typed) return false;
  if (ARROWS[event.key]) {
    const step = event.shiftKey ? 5 : 1;
    act.move(...ARROWS[event.key].map((way) => way * step));
    return true;
  }
  const does = {
    "[": () => act.head(-1), "]": () => act.head(1), "{": () => act.site(-1), "}": () => act.site(1),
    ",": () => act.frame(-1), ".": () => act.frame(1), t: act.special, p: act.pin,
    Escape: act.escape, d: act.direction, s: act.smooth, n: act.norm,
    h: () => act.multiples("heads"), m: () => act.multiples("sites"),
    "+": () => act.zoom(1.15), "=": () => act.zoom(1.15), "-": () => act.zoom(1 / 1.15),
    "?": act.help,
  }[event.key];
  does?.();
  return Boolean(does);
}
