// Small maps of one query: all heads of a site, or all sites for one head.

import { element } from "./dom.js";
import { fieldMaps } from "./scene.js";
import { paint, scaleOf } from "./colours.js";

const GAP = 1;
const PER_LINE = 4;

/** All panels beside one another in one small canvas, by a scale of their own. */
function smallCanvas(field, panels, norm, own, table) {
  const maps = fieldMaps(field);
  const [rows, cols] = field.layout.grid;
  const perLine = Math.min(panels, PER_LINE);
  const canvas = element("canvas");
  canvas.width = perLine * (cols + GAP) - GAP;
  canvas.height = Math.ceil(panels / perLine) * (rows + GAP) - GAP;
  const scale = scaleOf(maps, norm, own);
  for (const map of maps) {
    const [line, nth] = [Math.floor(map.panel / perLine), map.panel % perLine];
    paint(canvas, map, scale, table, [nth * (cols + GAP), line * (rows + GAP)]);
  }
  return canvas;
}

/** Cells in `root`, filled one after another so that the page stays quick; `choose(value)` on
 *  a click. */
export class Multiples {
  constructor(root, choose) {
    Object.assign(this, { root, choose, turn: 0 });
  }

  /** `cells`: `[{value, label, current, panels, field: () => Promise<field>}]`. */
  async show(cells, norm, own, table) {
    const turn = ++this.turn;
    const boxes = cells.map(({ value, label, current }) => {
      const picture = element("span", { class: "small" });
      const box = element("button", {
        type: "button", class: "cell", onclick: () => this.choose(value),
        "aria-pressed": String(current), "aria-label": label,
      }, element("bdi", {}, label), picture);
      return { box, picture };
    });
    const kept = [...this.root.children];
    boxes.forEach(({ picture }, n) => {
      const old = kept[n]?.querySelector("canvas");
      if (old) picture.append(old);
    });
    const focused = kept.indexOf(document.activeElement);
    this.root.replaceChildren(...boxes.map(({ box }) => box));
    boxes[focused]?.box.focus();
    for (const [n, { field, panels }] of cells.entries()) {
      let made;
      try {
        made = smallCanvas(await field(), panels, norm, own, table);
      } catch (error) {
        made = element("em", {}, error.message);
      }
      if (turn !== this.turn) return;
      boxes[n].picture.replaceChildren(made);
      await new Promise((done) => setTimeout(done));
    }
  }

  clear() {
    this.turn++;
    this.root.replaceChildren();
  }
}
