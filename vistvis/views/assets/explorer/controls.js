// What can be chosen: site, head, direction, and how it is drawn; and the bar of colours.

import { button, element, select, slider, weightText } from "./dom.js";
import { NORMS } from "./colours.js";

function headOptions(count) {
  const single = Array.from({ length: count }, (_, n) => [String(n), `head ${n}`]);
  return [["", [["mean", "mean of heads"], ["max", "largest of heads"], ...single]]];
}

function siteOptions(sights) {
  const groups = new Map();
  for (const { header, name } of sights.values()) {
    const kind = header.site?.kind ?? "without a kind";
    if (!groups.has(kind)) groups.set(kind, []);
    groups.get(kind).push([name, name]);
  }
  return [...groups];
}

/** The controls for a state, in `what` and `look`; `set(change)` where one is turned. */
export function fillControls({ what, look }, { state, sights, cmaps, set, act }) {
  const sight = sights.get(state.site);
  const number = (value) => (/^\d+$/.test(value) ? Number(value) : value);
  const choose = (name, read = (value) => value) => (value) => set({ [name]: read(value) });
  const several = sight.batches > 1
    ? [select("Batch", [["", numbered(sight.batches)]], String(state.batch), choose("batch", Number))]
    : [];
  const press = (name, text) =>
    button(text, () => act.multiples(name), { "aria-pressed": String(state.multiples === name) });
  const focused = focusedLabel([what, look]);
  what.replaceChildren(
    select("Site", siteOptions(sights), state.site, choose("site")),
    select("Head", headOptions(sight.header.shape[1]), String(state.head), choose("head", number)),
    select("Direction", [["", [["row", "attends to"], ["column", "attended by"]]]], state.direction,
      choose("direction")),
    ...several,
    element("div", { class: "buttons" }, press("heads", "All heads"), press("sites", "All sites")),
  );
  const smooth = element("input", { type: "checkbox", onchange: () => set({ smooth: smooth.checked }) });
  smooth.checked = state.smooth;
  look.replaceChildren(
    select("Colours", [["", [...cmaps.keys()].map((name) => [name, name])]], state.cmap, choose("cmap")),
    select("Scale", [["", NORMS.map((name) => [name, name])]], state.norm, choose("norm")),
    select("Scale of", [["", [["shared", "all frames"], ["frame", "each frame"]]]], state.scale,
      choose("scale")),
    slider("Opacity", [0, 1, 0.05], state.alpha, choose("alpha")),
    slider("Frame size", [80, 1200, 10], state.size, choose("size")),
    element("label", { class: "tick" }, smooth, element("span", {}, "smooth")),
    element("div", { class: "buttons" },
      button("PNG", () => act.save("png"), { title: "Save the view as PNG" }),
      button("SVG", () => act.save("svg"), { title: "Save the view as SVG" }),
      button("?", act.help, { title: "Keyboard", "aria-label": "Keyboard help" })),
  );
  if (focused) focusAgain([what, look], focused);
}

const numbered = (count) => Array.from({ length: count }, (_, n) => [String(n), String(n)]);

// Controls are made anew when the state changes: the one in use stays in use.
function focusedLabel(boxes) {
  const { activeElement } = document;
  if (!boxes.some((box) => box.contains(activeElement))) return null;
  return activeElement.closest("label")?.textContent.slice(0, 6) ?? activeElement.textContent;
}

function focusAgain(boxes, text) {
  const every = boxes.flatMap((box) => [...box.querySelectorAll("select, input, button")]);
  const named = (one) => one.closest("label")?.textContent.slice(0, 6) ?? one.textContent;
  every.find((one) => named(one) === text)?.focus();
}

/** The bar of colours with its numbers. */
export class ColourBar {
  constructor(root) {
    this.canvas = element("canvas", { width: 256, height: 1, "aria-hidden": "true" });
    this.low = element("span");
    this.middle = element("span");
    this.high = element("span");
    this.note = element("span", { class: "note" });
    root.append(this.note, this.canvas, element("div", { class: "ticks" }, this.low, this.middle, this.high));
  }

  show({ low, high, log }, largest, table, each) {
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(256, 1);
    for (let n = 0; n < 256; n++) {
      for (let c = 0; c < 3; c++) image.data[4 * n + c] = table[3 * n + c];
      image.data[4 * n + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    this.low.textContent = weightText(low);
    this.middle.textContent = weightText(log ? Math.sqrt(low * high) : (low + high) / 2);
    this.high.textContent = weightText(high);
    const above = largest > high * (1 + 1e-6) ? `white: above, up to ${weightText(largest)}` : "";
    this.note.textContent = [each ? "scale of the query's frame" : "weight", above].filter(Boolean).join(" · ");
  }
}
