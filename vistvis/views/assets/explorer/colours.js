// Weights to colours, in the house style of vistvis/views/painting.py.

import { fromBase64 } from "./decode.js";

export const NORMS = ["auto", "linear", "log", "percentile"];
const DECADES = 6;
const PERCENT = 0.99;

/** The page's colour maps, 256 RGB triples each; greys where it has none. */
export function colourTables(manifest) {
  const tables = new Map();
  for (const [name, text] of Object.entries(manifest.cmaps ?? {})) tables.set(name, fromBase64(text));
  if (!tables.size) tables.set("grey", new Uint8Array(768).map((_, n) => Math.floor(n / 3)));
  return tables;
}

/** `{low, high, log}` for all maps given together. `own` is `{panel, row, col}` of the query: with
 *  "auto" its patch doesn't count, nor do those beside it where there are other frames. */
export function scaleOf(maps, norm, own) {
  const reach = maps.length > 1 ? 1 : 0;
  const all = [];
  const others = [];
  for (const { panel, grid, values } of maps) {
    const mine = own && own.panel === panel;
    for (let n = 0; n < values.length; n++) {
      const value = values[n];
      if (!Number.isFinite(value)) continue;
      all.push(value);
      if (!mine || norm !== "auto") continue;
      const row = Math.floor(n / grid[1]);
      if (Math.abs(row - own.row) > reach || Math.abs(n - row * grid[1] - own.col) > reach) {
        others.push(value);
      }
    }
    if (norm === "auto" && !mine) for (const value of values) if (Number.isFinite(value)) others.push(value);
  }
  const largest = (values) => values.reduce((most, value) => Math.max(most, value), -Infinity);
  let high = all.length ? largest(all) : 0;
  if (norm === "auto" && largest(others) > 0) high = largest(others);
  if (norm === "log" && high > 0) {
    const least = all.reduce((low, value) => (value > 0 ? Math.min(low, value) : low), high);
    const low = Math.max(least, high * 10 ** -DECADES);
    return { low: low < high ? low : high / 10, high, log: true };
  }
  if (norm === "percentile" && all.length) {
    const sorted = Float64Array.from(all).sort();
    const at = PERCENT * (sorted.length - 1);
    const under = Math.floor(at);
    const cut = sorted[under] + (at - under) * ((sorted[under + 1] ?? sorted[under]) - sorted[under]);
    if (cut > 0) high = cut;
  }
  return { low: 0, high: high > 0 ? high : 1, log: false };
}

/** Where a value lies on a scale, from 0 to 1; above 1 it is drawn white. */
export function heightOf({ low, high, log }, value) {
  if (log) return value > 0 ? Math.log(value / low) / Math.log(high / low) : 0;
  return (value - low) / (high - low);
}

/** A map into a canvas, one pixel a patch; NaN is the colour of nothing. */
export function paint(canvas, { grid: [rows, cols], values }, scale, table, [x, y] = [0, 0]) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(cols, rows);
  const pixels = image.data;
  for (let n = 0; n < values.length; n++) {
    const height = heightOf(scale, values[n]);
    const at = 4 * n;
    if (height > 1 + 1e-6) pixels[at] = pixels[at + 1] = pixels[at + 2] = 255;
    else {
      const step = 3 * Math.max(0, Math.min(255, Math.floor(height * 256) || 0));
      pixels[at] = table[step];
      pixels[at + 1] = table[step + 1];
      pixels[at + 2] = table[step + 2];
    }
    pixels[at + 3] = 255;
  }
  context.putImageData(image, x, y);
}
