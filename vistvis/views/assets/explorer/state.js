// What is shown, as plain data, and as the hash of a link that shows it again.

import { NORMS } from "./colours.js";

export const START = {
  site: null, head: "mean", batch: 0, token: null, direction: "row", cmap: null, alpha: 0.55,
  norm: "auto", scale: "shared", smooth: false, size: null, pins: [], multiples: "none",
};
const CHOICES = {
  direction: ["row", "column"], norm: NORMS, scale: ["shared", "frame"],
  multiples: ["none", "heads", "sites"],
};

/** The state with what is wrong in it, after `sights` and colour maps `cmaps`, set right. */
export function checkedState(given, sights, cmaps) {
  const state = { ...START, ...given };
  if (!sights.has(state.site)) state.site = firstSite(sights);
  for (const [name, values] of Object.entries(CHOICES)) {
    if (!values.includes(state[name])) state[name] = START[name];
  }
  if (!cmaps.has(state.cmap)) state.cmap = cmaps.has("inferno") ? "inferno" : [...cmaps.keys()][0];
  const sight = sights.get(state.site);
  if (!sight) return state;
  const within = (value, count) => Number.isInteger(value) && value >= 0 && value < count;
  const heads = sight.header.shape[1];
  if (state.head !== "max" && !within(state.head, heads)) state.head = "mean";
  if (!within(state.batch, sight.batches)) state.batch = 0;
  const layout = sight.asking(state.direction);
  if (!within(state.token, layout.count)) state.token = middleOf(layout);
  state.pins = [...new Set(state.pins)].filter((token) => within(token, layout.count));
  state.alpha = Math.min(1, Math.max(0, Number(state.alpha)));
  if (!Number.isFinite(state.alpha)) state.alpha = START.alpha;
  return state;
}

/** The last site that sees most frames, a global one where there is one: what says most. */
function firstSite(sights) {
  let best = null;
  for (const sight of sights.values()) {
    const frames = sight.strip ? 0 : sight.sides.key.frames;
    const rank = frames + (sight.header.site?.kind === "global" ? 0.5 : 0);
    if (!best || rank >= best.rank) best = { rank, name: sight.name };
  }
  return best?.name ?? null;
}

function middleOf(layout) {
  if (!layout.patches) return 0;
  const [rows, cols] = layout.grid;
  return Math.min(layout.count - 1, layout.patchToken(0, rows >> 1, cols >> 1));
}

/** What differs from how the page starts; `own` is what it says of that itself. */
export function stateHash(state, own = {}) {
  const words = new URLSearchParams();
  for (const [name, start] of Object.entries({ ...START, ...own })) {
    if (String(state[name]) !== String(start) && state[name] !== null) {
      words.set(name, String(state[name]));
    }
  }
  return `#${words}`;
}

const isNumber = (text) => /^\d+(\.\d+)?$/.test(text);

export function hashState(hash) {
  const state = {};
  for (const [name, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!(name in START)) continue;
    if (name === "pins") state.pins = text.split(",").filter(isNumber).map(Number);
    else if (name === "smooth") state.smooth = text === "true";
    else if (name === "site" || name === "cmap") state[name] = text;
    else state[name] = isNumber(text) ? Number(text) : text;
  }
  return state;
}
