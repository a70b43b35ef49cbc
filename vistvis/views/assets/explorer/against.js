// Two runs of the same pictures side by side, at the same site, head and query; and their
// difference, the second minus the first.

import { paint, scaleOf } from "./colours.js";
import { element, weightText } from "./dom.js";
import { overScene } from "./scene.js";

const LESS = [70, 165, 255];
const MORE = [255, 150, 40];

/** 256 colours from less over black, which leaves the picture as it is, to more. */
const DIVERGING = Uint8Array.from({ length: 768 }, (_, n) => {
  const height = (Math.floor(n / 3) - 127.5) / 127.5;
  return Math.abs(height) * (height < 0 ? LESS : MORE)[n % 3];
});

/** A frame's picture with a canvas over it, as the frames of the page have it. */
class AgainstMap {
  constructor({ source, layout, frame, label, ask, pick }) {
    const url = source.image(0, frame);
    const [rows, cols] = layout.grid;
    const [down, across] = layout.patchSize;
    this.canvas = element("canvas", { class: "heat", width: cols, height: rows });
    this.mark = element("i", { class: "mark query", hidden: true });
    this.mark.style.cssText = `width: ${100 / cols}%; height: ${100 / rows}%; --colour: #0a3`;
    this.root = element("div", { class: "picture", role: "img", "aria-label": label },
      url ? element("img", { src: url, alt: "" }) : null, this.canvas,
      element("div", { class: "marks" }, this.mark));
    this.root.style.aspectRatio = `${cols * across} / ${rows * down}`;
    const tokenAt = ({ clientX, clientY }) => {
      const box = this.root.getBoundingClientRect();
      const within = (part, count) => Math.max(0, Math.min(count - 1, Math.floor(part * count)));
      const row = within((clientY - box.top) / box.height, rows);
      return layout.patchToken(frame, row, within((clientX - box.left) / box.width, cols));
    };
    this.root.addEventListener("pointermove", (event) => ask(tokenAt(event)));
    this.root.addEventListener("pointerleave", () => ask(null));
    this.root.addEventListener("click", (event) => pick(tokenAt(event)));
    Object.assign(this, { frame, grid: layout.grid });
  }

  /** Where nothing is known of a frame, its picture alone. */
  show(values, scale, table) {
    const known = values?.some((value) => !Number.isNaN(value)) ?? false;
    this.root.classList.toggle("lit", known);
    const plain = known ? values.map((value) => (Number.isNaN(value) ? 0 : value)) : [];
    if (known) paint(this.canvas, { grid: this.grid, values: plain }, scale, table);
  }

  outline(query) {
    this.mark.hidden = !query || query.patch === null || query.frame !== this.frame;
    if (this.mark.hidden) return;
    this.mark.style.left = `${(100 * query.col) / this.grid[1]}%`;
    this.mark.style.top = `${(100 * query.row) / this.grid[0]}%`;
  }
}

export class Against {
  /** `shown` is the page's view, `kernel` gives those of the other run by the site's name. */
  constructor(shown, kernel, labels, { ask, pick }) {
    Object.assign(this, { shown, kernel, labels, loaded: new Map() });
    const { source, layout } = shown;
    const titles = [...labels, `${labels[1]} − ${labels[0]}`];
    this.grid = element("div", { class: "against-maps" },
      ...titles.map((title) => element("h3", {}, element("bdi", {}, title))));
    this.maps = Array.from({ length: layout.frames }, (_, frame) =>
      titles.map((title) => {
        const label = `frame ${frame}: ${title}`;
        const map = new AgainstMap({ source, layout, frame, label, ask, pick });
        this.grid.append(map.root);
        return map;
      }));
    this.said = element("p", { class: "against-said", role: "status" });
    this.ends = [element("span"), element("span")];
    const bar = element("div", { class: "against-bar", "aria-hidden": "true" }, this.ends[0],
      element("i"), this.ends[1]);
    const region = { class: "against", "aria-label": "Two runs side by side" };
    this.root = element("section", region, this.said, bar, this.grid);
    shown.panes.append(this.root);
  }

  /** What the page shows now, `values` over the scene's tokens, and the same of the other run. */
  show(values, query) {
    this.values = this.other = this.difference = null;
    if (!values) return this.clear("Nothing to set side by side here.");
    const { state } = this.shown;
    const name = state.site;
    const kernel = this.loaded.get(name);
    if (!kernel) {
      this.clear("Loading the other run …");
      const still = () => this.shown.state.site === name;
      this.kernel(name).then((made) => {
        this.loaded.set(name, made);
        if (still()) this.shown.tell((...row) => this.show(...row));
      }, (error) => still() && this.clear(error.message));
      return;
    }
    const answer = this.shown.answerOf(name, query.token, state.head, kernel);
    this.values = values;
    this.other = overScene(answer.field, this.shown.layout);
    this.difference = this.other.map((value, n) => value - values[n]);
    this.paint(query);
  }

  /** The patches of each frame, as `scaleOf` takes them. */
  parts(values) {
    const { layout } = this.shown;
    return this.maps.map((_, panel) => {
      const start = layout.patchToken(panel, 0, 0);
      return { panel, grid: layout.grid, values: values.subarray(start, start + layout.patches) };
    });
  }

  paint(query) {
    const { state, cmaps, layout } = this.shown;
    const runs = [this.values, this.other, this.difference].map((values) => this.parts(values));
    const own = query.patch === null ? null : { panel: query.frame, ...query };
    const scale = scaleOf([...runs[0], ...runs[1]], state.norm, own);
    let [moved, largest, where] = [0, 0, 0];
    this.difference.forEach((value, token) => {
      if (Number.isNaN(value)) return;
      moved += Math.abs(value) / 2;
      if (Math.abs(value) > Math.abs(largest)) [largest, where] = [value, token];
    });
    // The scale of the difference is that of patches: special tokens have no place in a picture.
    const reach = runs[2].reduce((most, { values }) =>
      values.reduce((m, value) => (Math.abs(value) > m ? Math.abs(value) : m), most), 0);
    const apart = { low: -(reach || 1), high: reach || 1, log: false };
    const table = cmaps.get(state.cmap);
    this.maps.forEach((maps, frame) => {
      maps.forEach((map, n) => {
        map.show(runs[n][frame].values, n < 2 ? scale : apart, n < 2 ? table : DIVERGING);
        map.outline(query);
      });
    });
    this.ends[0].textContent = `−${weightText(reach)}`;
    this.ends[1].textContent = `+${weightText(reach)}`;
    const { frame, kind, patch, row, col } = layout.locate(where);
    const place = patch === null ? `${kind} token ${where}` : `frame ${frame} · r${row} c${col}`;
    const mass = `mass that lies elsewhere ${weightText(moved)}; `;
    const sign = largest < 0 ? "−" : "+";
    this.said.textContent = largest === 0
      ? "Both are equal."
      : `${state.direction === "row" && state.head !== "max" ? mass : ""}largest difference ` +
        `${sign}${weightText(Math.abs(largest))} at ${place}`;
  }

  clear(text) {
    this.said.textContent = text;
    for (const map of this.maps.flat()) {
      map.show(null);
      map.outline(null);
    }
    for (const end of this.ends) end.textContent = "";
  }
}
