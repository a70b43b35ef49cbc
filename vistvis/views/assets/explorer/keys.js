// The keyboard: every key, what it does, and the help that says so.

import { button, element } from "./dom.js";
import { NORMS } from "./colours.js";

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

/** What keys and buttons do to a view. */
export function actsOf(view) {
  const step = (list, value, way) => list[(list.indexOf(value) + way + list.length) % list.length];
  const { state, sight } = view;
  const place = () => view.asking.locate(state.token);
  const heads = ["mean", "max", ...Array.from({ length: sight?.header.shape[1] ?? 0 }, (_, n) => n)];
  const toPatch = (frame, row, col) => {
    const { grid, count, frames } = view.asking;
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    const at = [within(frame, frames), within(row, grid[0]), within(col, grid[1])];
    view.set({ token: Math.min(count - 1, view.asking.patchToken(...at)) });
  };
  const middle = () => view.asking.grid.map((size) => size >> 1);
  return {
    move: (down, right) => {
      const { frame, patch, row, col } = place();
      if (patch === null) toPatch(frame ?? 0, ...middle());
      else toPatch(frame, row + down, col + right);
    },
    frame: (way) => {
      const { frame, patch, row, col } = place();
      toPatch((frame ?? 0) + way, ...(patch === null ? middle() : [row, col]));
    },
    special: () => {
      const { frame, token, patch } = place();
      const specials = view.asking.specials(frame);
      const next = specials[specials.findIndex((one) => one.token === token) + 1];
      if (next) view.set({ token: next.token });
      else if (patch === null) toPatch(frame ?? 0, ...middle());
    },
    head: (way) => view.set({ head: step(heads, state.head, way) }),
    site: (way) => view.set({ site: step([...view.sights.keys()], state.site, way) }),
    pin: () => view.pick({ token: state.token, panel: sight.askingPanel(state.direction, 0) }),
    escape: () => view.set({ pins: [] }),
    direction: () => view.set({ direction: state.direction === "row" ? "column" : "row" }),
    smooth: () => view.set({ smooth: !state.smooth }),
    norm: () => view.set({ norm: step(NORMS, state.norm, 1) }),
    multiples: (name) => view.set({ multiples: state.multiples === name ? "none" : name }),
    zoom: (factor) => view.set({ size: Math.round(Math.max(80, Math.min(1200, state.size * factor))) }),
    help: () => view.help.showModal(),
    save: (kind) => view.save(kind),
  };
}
