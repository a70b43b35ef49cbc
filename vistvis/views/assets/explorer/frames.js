// All frames side by side: pictures, the heat over them, outlines, and chips of special tokens.

import { element, weightText } from "./dom.js";
import { fieldMaps, overScene } from "./scene.js";
import { paint, scaleOf } from "./colours.js";

// Of a frame's caption and chips, about, in pixels.
const CHIPS = 80;
// One line of frames is easier to look along than several, even if they come out this much smaller.
const EASY = 0.7;
const SMALLEST = 110;

export const QUERY = "#00d746";
export const PIN_COLOURS = ["#ff5d8f", "#39b5ff", "#ffb000", "#b388ff", "#00d3c0", "#ff7a45"];
export const pinColour = (nth) => PIN_COLOURS[nth % PIN_COLOURS.length];

/** The panels of one site, in `root`. `on` has `hover(token)` (null: nothing under the mouse) and
 *  `pick(token)`; tokens are of the answering side's own place, see `tokenAt`. */
export class Frames {
  constructor(root, source, on) {
    Object.assign(this, { root, source, on, panels: [], key: null });
  }

  /** Panels for a sight; those there stay where they fit. */
  build(sight, direction, batch) {
    const kept = JSON.stringify([sight.strip && sight.name, direction, batch, sight.panels]);
    if (kept === this.key) return;
    this.key = kept;
    this.sight = sight;
    this.direction = direction;
    // Those of one scene after those of another.
    const frames = this.source.manifest.frames?.slice(batch * sight.panels);
    this.panels = Array.from({ length: sight.panels }, (_, number) => {
      const name = sight.strip ? stripName(sight, number) : frames?.[number]?.name ?? `frame ${number}`;
      return this.panel(number, name, sight.strip ? null : this.source.image(batch, number));
    });
    const rest = sight.strip ? [] : sight.whole.specials(null);
    this.rest = element("div", { class: "chips" });
    const more = rest.length ? [element("figure", { class: "rest" }, this.rest)] : [];
    this.root.replaceChildren(...this.panels.map(({ figure }) => figure), ...more);
    this.chips = new Map();
    if (sight.strip) return;
    this.panels.forEach(({ chips }, frame) => this.addChips(chips, sight.whole.specials(frame)));
    this.addChips(this.rest, rest);
  }

  panel(number, name, url) {
    const layout = this.sight.strip
      ? this.sight.sides[number ? "key" : "query"]
      : this.sight.whole;
    const canvas = element("canvas", { class: "heat" });
    const picture = element("div", { class: url ? "picture" : "picture bare" });
    if (url) picture.append(element("img", { src: url, alt: "", draggable: "false" }));
    const marks = element("div", { class: "marks" });
    picture.append(canvas, marks);
    const [rows, cols] = layout.grid;
    const [down, across] = layout.patchSize;
    picture.style.aspectRatio = `${cols * across} / ${rows * down}`;
    const at = (event) => this.tokenAt(number, event, picture, layout);
    picture.addEventListener("pointermove", (event) => this.on.hover(at(event)));
    picture.addEventListener("pointerleave", () => this.on.hover(null));
    picture.addEventListener("click", (event) => this.on.pick(at(event)));
    const chips = element("div", { class: "chips" });
    const caption = element("figcaption", {}, element("bdi", {}, name));
    const figure = element("figure", {}, caption, picture, chips);
    return { figure, picture, canvas, marks, chips, name, url, layout };
  }

  /** `{panel, token}` under the mouse: in the scene's layout, or of the strip it lies on. */
  tokenAt(panel, event, picture, layout) {
    const box = picture.getBoundingClientRect();
    const [rows, cols] = layout.grid;
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const col = Math.floor(((event.clientX - box.left) / box.width) * cols);
    if (row < 0 || col < 0 || row >= rows || col >= cols) return null;
    const token = layout.patchToken(this.sight.strip ? 0 : panel, row, col);
    return token < layout.count ? { panel, token } : null;
  }

  addChips(box, specials) {
    const counts = {};
    for (const { kind } of specials) counts[kind] = (counts[kind] ?? 0) + 1;
    const nth = {};
    for (const place of specials) {
      nth[place.kind] = (nth[place.kind] ?? -1) + 1;
      const text = counts[place.kind] > 1 ? `${place.kind} ${nth[place.kind]}` : place.kind;
      const where = place.frame === null ? "" : ` of frame ${place.frame}`;
      const value = element("span", { class: "value" });
      const hit = { panel: place.frame ?? 0, token: place.token };
      const chip = element("button", {
        type: "button", class: "chip", title: `${text} token${where}, token ${place.token}`,
        onpointerenter: () => this.on.hover(hit), onpointerleave: () => this.on.hover(null),
        onclick: () => this.on.pick(hit),
      }, element("bdi", {}, text), value);
      this.chips.set(place.token, { chip, value });
      box.append(chip);
    }
  }

  /** Paint a field; returns the scales in use, one or one a panel, and whether values lie above. */
  paint(field, { norm, scale, smooth, alpha }, own, table) {
    const maps = fieldMaps(field);
    const shared = scale === "shared" ? scaleOf(maps, norm, own) : null;
    const scales = new Map();
    for (const map of maps) {
      const { canvas, picture } = this.panels[map.panel];
      const [rows, cols] = map.grid;
      if (canvas.width !== cols) canvas.width = cols;
      if (canvas.height !== rows) canvas.height = rows;
      const used = shared ?? scaleOf([map], norm, own);
      scales.set(map.panel, used);
      paint(canvas, map, used, table);
      picture.classList.add("lit");
    }
    this.panels.forEach(({ picture }, number) => {
      if (!scales.has(number)) picture.classList.remove("lit");
    });
    this.root.style.setProperty("--grey", String(1 - alpha));
    this.root.classList.toggle("smooth", smooth);
    this.paintChips(field);
    return { maps, scales, shared };
  }

  paintChips(field) {
    if (this.sight.strip) return;
    const values = overScene(field, this.sight.whole);
    for (const [token, { value }] of this.chips) value.textContent = weightText(values[token]);
  }

  clear() {
    for (const { picture } of this.panels) picture.classList.remove("lit");
    for (const { value } of this.chips?.values() ?? []) value.textContent = "";
  }

  /** Outlines, each exactly one patch: `[{panel, place, colour, kind}]`. */
  mark(outlines) {
    for (const { marks } of this.panels) marks.replaceChildren();
    for (const { chip } of this.chips?.values() ?? []) {
      chip.classList.remove("marked");
      chip.style.removeProperty("--colour");
      chip.removeAttribute("aria-pressed");
    }
    for (const { panel, place, colour, kind, grid } of outlines) {
      if (place.patch === null) {
        const chip = this.chips?.get(place.token)?.chip;
        if (!chip) continue;
        chip.classList.add("marked");
        chip.style.setProperty("--colour", colour);
        if (kind === "query") chip.setAttribute("aria-pressed", "true");
        continue;
      }
      if (!this.panels[panel]) continue;
      const { marks, layout } = this.panels[panel];
      const [rows, cols] = place.frame === panel || !grid ? layout.grid : grid;
      const box = element("i", { class: `mark ${kind}` });
      box.style.left = `${(100 * place.col) / cols}%`;
      box.style.top = `${(100 * place.row) / rows}%`;
      box.style.width = `${100 / cols}%`;
      box.style.height = `${100 / rows}%`;
      box.style.setProperty("--colour", colour);
      marks.append(box);
    }
  }
}

function stripName(sight, number) {
  if (sight.panels === 1) return `${sight.sides.query.count} tokens`;
  const side = number ? "key" : "query";
  return `${sight.sides[side].count} ${side === "key" ? "keys" : "queries"}`;
}

/** The width of a frame with which `count` of them fill a box of `width` and `height` best. */
export function fittingSize(count, aspect, width, height, gap) {
  const sizes = Array.from({ length: count }, (_, n) => {
    const lines = Math.ceil(count / (n + 1));
    const down = (height - (gap + CHIPS) * lines) / lines;
    return Math.min((width - gap * n) / (n + 1), down * aspect);
  });
  const best = Math.max(...sizes);
  const one = sizes.at(-1);
  return Math.max(SMALLEST, Math.floor(one > EASY * best ? one : best));
}
