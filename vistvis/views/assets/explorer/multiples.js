// Small maps of one query: all heads of a site, or all sites for one head.

import { element } from "./dom.js";
import { fieldMaps } from "./scene.js";
import { paint, scaleOf } from "./colours.js";

const GAP = 1;

/** A field's frames beside one another in one small canvas, by a scale of their own. */
function smallCanvas(field, norm, own, table) {
  const maps = fieldMaps(field);
  const canvas = element("canvas");
  canvas.width = maps.reduce((sum, { grid }) => sum + grid[1] + GAP, -GAP);
  canvas.height = Math.max(...maps.map(({ grid }) => grid[0]));
  const scale = scaleOf(maps, norm, own);
  let x = 0;
  for (const map of maps) {
    paint(canvas, map, scale, table, [x, 0]);
    x += map.grid[1] + GAP;
  }
  return canvas;
}

/** Cells in `root`, filled one after another so that the page stays quick; `choose(value)` on
 *  a click. */
export class Multiples {
  constructor(root, choose) {
    Object.assign(this, { root, choose, turn: 0 });
  }

  /** `cells`: `[{value, label, current, field: () => Promise<field>}]`. */
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
    this.root.replaceChildren(...boxes.map(({ box }) => box));
    for (const [n, { field }] of cells.entries()) {
      let made;
      try {
        made = smallCanvas(await field(), norm, own, table);
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
