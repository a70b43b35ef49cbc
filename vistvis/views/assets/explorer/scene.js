// A token of the scene's layout ↔ batch item and tokens of a site, as vistvis/views/maps.py and
// vistvis/attention/order.py have it.

import { Layout } from "./layout.js";

const STRIP = 64;

/** Tokens of which no layout says where they lie: one after the other, in lines. */
function stripLayout(count) {
  const cols = Math.max(1, Math.min(count, Math.max(STRIP, Math.ceil(Math.sqrt(count)))));
  const grid = [Math.max(1, Math.ceil(count / cols)), cols];
  const layout = new Layout({ frames: 1, grid, special: [], patch_size: [1, 1] });
  return Object.assign(layout, { patches: count, perFrame: count, count });
}

function originals(tensors, side, item) {
  const tokens = tensors[`${side}_tokens`];
  if (!tokens) return null;
  const width = tokens.shape.at(-1);
  const start = tokens.shape.length === 1 ? 0 : item * width;
  const members = tensors[`${side}_members`];
  return {
    tokens: tokens.data.subarray(start, start + width),
    members: members ? members.data.subarray(start, start + width) : null,
  };
}

function capturedToken(order, token, name) {
  if (!order) return token;
  const at = order.tokens.indexOf(token);
  if (at < 0) throw new RangeError(`token ${token} is not among the tokens that ${name} saw`);
  return order.members ? order.members[at] : at;
}

function memberSizes(order, count) {
  const sizes = new Int32Array(count);
  order.members?.forEach((member) => sizes[member]++);
  return sizes;
}

/** How a site's tokens lie in the scene: what can be asked, and where the answer belongs. */
export class Sight {
  constructor(whole, header) {
    const { site, shape } = header;
    this.header = header;
    this.name = header.name;
    this.strip = !(whole && site?.query_layout && site?.key_layout);
    this.folded = Boolean(site?.frames_in_batch) && !this.strip;
    this.first = site?.first_frame ?? 0;
    if (this.strip) {
      this.sides = { query: stripLayout(shape[2]), key: stripLayout(shape[3]) };
      this.panels = shape[2] === shape[3] ? 1 : 2;
      this.batches = shape[0];
    } else {
      this.whole = whole;
      this.sides = { query: new Layout(site.query_layout), key: new Layout(site.key_layout) };
      this.panels = whole.frames;
      const order = header.tensors.frame_order;
      const several = order ? order.shape[0] : Math.floor(shape[0] / whole.frames);
      this.batches = this.folded ? several : shape[0];
    }
  }

  /** The layout in whose tokens one asks; they are queries of rows and keys of columns. */
  asking(direction) {
    return this.strip ? this.sides[direction === "row" ? "query" : "key"] : this.whole;
  }

  /** The panel that shows a frame of the asking layout. */
  askingPanel(direction, frame) {
    return this.strip ? Number(direction === "column" && this.panels === 2) : frame;
  }

  /** `{item, token, field(values)}`: what a kernel is asked, and what its answer means: `values`
   *  over `layout`, whose frames lie in `panels` (null: in none). An Error says why there is none. */
  ask(direction, tensors, token, batch) {
    const [near, far] = direction === "row" ? ["query", "key"] : ["key", "query"];
    const place = this.asking(direction).locate(token);
    const own = this.strip ? token : this.ownToken(near, place);
    const item = this.item(tensors, batch, place.frame);
    const nearOrder = originals(tensors, near, item);
    const farOrder = originals(tensors, far, item);
    const layout = this.sides[far];
    const panels = this.answeringPanels(direction, far, place.frame);
    if (direction === "row" && farOrder) {
      const seen = new Set();
      for (const one of farOrder.tokens) if (one >= 0) seen.add(layout.locate(one).frame);
      panels.forEach((_, frame) => { if (!seen.has(frame)) panels[frame] = null; });
    }
    const count = farOrder ? layout.count : this.header.shape[far === "key" ? 3 : 2];
    if (count !== layout.count) {
      throw new Error(`${this.name} has ${count} ${far} tokens, and its layout ${layout.count}`);
    }
    const asked = capturedToken(nearOrder, own, this.name);
    const field = (values) => ({ layout, panels, values });
    if (direction === "row") {
      return { item, token: asked, field: (row) => field(spreadRow(farOrder, row, count)) };
    }
    const share = nearOrder?.members ? 1 / memberSizes(nearOrder, this.header.shape[3])[asked] : 1;
    return {
      item,
      token: asked,
      field: (column) => field(spreadColumn(farOrder, column, count, share)),
    };
  }

  item(tensors, batch, frame) {
    if (!this.folded) return batch;
    if (frame === null) throw new Error(`${this.name} sees single frames; choose a token of one`);
    const order = tensors.frame_order;
    if (!order) return batch * this.whole.frames + frame;
    const [, width] = order.shape;
    const at = order.data.subarray(batch * width, (batch + 1) * width).indexOf(frame);
    if (at < 0) throw new RangeError(`frame ${frame} is not among those that ${this.name} saw`);
    return batch * width + at;
  }

  ownToken(side, place) {
    const layout = this.sides[side];
    const { whole, name } = this;
    if (layout.equals(whole)) return place.token;
    let frame = place.frame;
    if (frame === null) throw new Error(`${name} has no token that lies in no frame`);
    const first = side === "query" ? this.first : 0;
    if (layout.frames === 1 && (this.folded || whole.frames === 1)) frame = 0;
    else if (first || layout.frames === whole.frames) {
      frame -= first;
      if (frame < 0 || frame >= layout.frames) {
        const last = first + layout.frames - 1;
        throw new Error(`${name} has the queries of frame ${first} to ${last}; choose one of them`);
      }
    } else {
      throw new Error(`${name} has ${layout.frames} of ${whole.frames} frames, not said which`);
    }
    if (place.patch === null) {
      const found = samePlace(place, whole, layout, frame);
      if (!found) throw new Error(`${name} has no such ${place.kind} token`);
      return found.token;
    }
    if (String(layout.grid) !== String(whole.grid)) {
      const [one, other] = [layout.grid, whole.grid].map((grid) => grid.join("×"));
      throw new Error(`${name} has a grid of ${one} patches, the scene of ${other}; ask the other way`);
    }
    return layout.patchToken(frame, place.row, place.col);
  }

  answeringPanels(direction, far, frame) {
    const { frames } = this.sides[far];
    if (this.strip) return [Number(direction === "row" && this.panels === 2)];
    if (frames === this.whole.frames) return Array.from({ length: frames }, (_, n) => n);
    if (this.folded && frame !== null) return [frame];
    if (far === "query" && this.first) {
      return Array.from({ length: frames }, (_, n) => n + this.first);
    }
    const all = this.whole.frames;
    throw new Error(`${this.name} has ${far} tokens of ${frames} of ${all} frames, not said which`);
  }
}

/** Weights of captured keys on original ones: merged ones share theirs, dropped ones get 0. */
function spreadRow(order, row, count) {
  if (!order) return row;
  const out = new Float32Array(count);
  const sizes = memberSizes(order, row.length);
  order.tokens.forEach((token, at) => {
    if (token < 0) return;
    out[token] += order.members ? row[order.members[at]] / sizes[order.members[at]] : row[at];
  });
  return out;
}

/** What original queries give: that of the captured one each is part of; dropped ones have none. */
function spreadColumn(order, column, count, share) {
  if (!order) return share === 1 ? column : column.map((value) => value * share);
  const out = new Float32Array(count).fill(NaN);
  for (let at = order.tokens.length - 1; at >= 0; at--) {
    const token = order.tokens[at];
    if (token >= 0) out[token] = column[order.members ? order.members[at] : at] * share;
  }
  return out;
}

/** A field over the scene's own tokens, NaN where it says nothing or has another grid. */
export function overScene({ layout, panels, values }, whole) {
  if (layout.equals(whole)) return values;
  const out = new Float32Array(whole.count).fill(NaN);
  const same = String(layout.grid) === String(whole.grid);
  panels.forEach((panel, frame) => {
    if (panel === null) return;
    for (const place of layout.specials(frame)) {
      const found = samePlace(place, layout, whole, panel);
      if (found) out[found.token] = values[place.token];
    }
    if (!same || !layout.patches) return;
    const start = layout.patchToken(frame, 0, 0);
    out.set(values.subarray(start, start + layout.patches), whole.patchToken(panel, 0, 0));
  });
  return out;
}

/** A place of one layout in a frame of another: the patch there, or the n-th token of its kind. */
export function samePlace(place, layout, other, frame) {
  if (place.patch !== null) return other.locate(other.patchToken(frame, place.row, place.col));
  const alike = ({ kind }) => kind === place.kind;
  const nth = layout.specials(place.frame).filter(alike).findIndex((s) => s.token === place.token);
  return other.specials(frame).filter(alike)[nth];
}

/** The patches of each of a field's frames: `[{panel, frame, grid, values}]`. */
export function fieldMaps({ layout, panels, values }) {
  const maps = [];
  panels.forEach((panel, frame) => {
    if (panel === null) return;
    const start = layout.start(frame) + layout.special.length;
    const part = values.subarray(start, start + layout.patches);
    maps.push({ panel, frame, grid: layout.grid, values: part });
  });
  return maps;
}
