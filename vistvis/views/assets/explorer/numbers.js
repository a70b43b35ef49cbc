// The panel of numbers: where the query lies, what it gives where, and the strongest of it.

import { button, element, weightText } from "./dom.js";

const STRONGEST = 8;

/** All the panel says of a field, as plain data: what «Copy as JSON» copies. */
export function reading(field, sight) {
  const { layout, panels, values } = field;
  let entropy = 0;
  let sum = 0;
  for (const value of values) {
    if (!(value > 0)) continue;
    sum += value;
    entropy -= value * Math.log(value);
  }
  const mass = { frames: [], kinds: {} };
  const add = (place) => {
    const { kind } = place;
    const value = values[place.token];
    if (value > 0) mass.kinds[kind] = (mass.kinds[kind] ?? 0) + value;
    else mass.kinds[kind] ??= 0;
  };
  for (let frame = 0; frame < layout.frames; frame++) {
    let inFrame = 0;
    const start = layout.start(frame);
    for (let n = start; n < start + layout.perFrame; n++) if (values[n] > 0) inFrame += values[n];
    if (panels[frame] !== null && panels[frame] !== undefined) {
      mass.frames.push({ panel: panels[frame], mass: inFrame });
    }
    layout.specials(frame).forEach(add);
  }
  layout.specials(null).forEach(add);
  const order = strongestOf(values);
  const strongest = order.map((token) => {
    const place = layout.locate(token);
    const panel = place.frame === null ? null : panels[place.frame] ?? null;
    return { token, weight: values[token], panel, place, text: placeText(place, panel, sight) };
  });
  return { sum, entropy, mass, strongest };
}

function strongestOf(values) {
  const best = [];
  for (let n = 0; n < values.length; n++) {
    const value = values[n];
    if (!(value > 0)) continue;
    if (best.length === STRONGEST && value <= values[best.at(-1)]) continue;
    let at = best.length;
    while (at > 0 && values[best[at - 1]] < value) at--;
    best.splice(at, 0, n);
    if (best.length > STRONGEST) best.pop();
  }
  return best;
}

export function placeText(place, panel, sight) {
  if (sight.strip) return `token ${place.token}`;
  const where = panel === null ? "" : `frame ${panel} · `;
  return place.patch === null ? `${where}${place.kind}` : `${where}r${place.row} c${place.col}`;
}

function line(label, value, title = null) {
  return [element("dt", {}, label), element("dd", { title }, value)];
}

/** The call that gives the same numbers in Python. */
export function pythonCall(manifest, asked, state) {
  const name = JSON.stringify(asked.site);
  const heads = typeof state.head === "number" ? `, heads=${state.head}` : "";
  const call = state.direction === "row" ? "rows" : "columns";
  const folded = { mean: ".mean(1)", max: ".amax(1)" }[state.head] ?? "";
  const opened = manifest.python ? `${manifest.python}\n` : "";
  return `${opened}run[${name}].${call}(${asked.token}, batch=${asked.item}${heads})${folded}`;
}

/** `show({…})` fills `root`; `on.highlight(token or null)` where a line is pointed at. */
export class Numbers {
  constructor(root, on) {
    this.on = on;
    this.title = element("h2");
    this.where = element("dl", { class: "where" });
    this.under = element("p", { class: "under" });
    this.masses = element("div", { class: "masses" });
    this.list = element("ol", { class: "strongest" });
    this.copied = element("span", { class: "copied", role: "status" });
    const buttons = element("div", { class: "buttons" },
      button("Copy as JSON", () => this.copy("json")),
      button("Copy as Python", () => this.copy("python")), this.copied);
    root.append(this.title, this.where, this.under,
      element("h3", {}, "Mass"), this.masses,
      this.heading = element("h3", {}, "Strongest"), this.list, buttons);
  }

  show({ place, panel, sight, state, asked, said, under, manifest }) {
    this.texts = {
      json: () => JSON.stringify(jsonOf({ place, state, asked, said }), null, 2),
      python: () => pythonCall(manifest, asked, state),
    };
    this.title.textContent = placeText(place, panel, sight);
    const lines = [];
    if (sight.strip) lines.push(...line("token", String(place.token)));
    else {
      const inFrame = place.frame === null ? "–" : String(place.inFrame);
      lines.push(...line("in its frame", inFrame, "token, counted within its frame"));
      lines.push(...line("in all", String(place.token), "token, counted through all frames"));
    }
    if (state.direction === "row") lines.push(...line("entropy", `${said.entropy.toFixed(3)} nats`));
    lines.push(...line("sum", weightText(said.sum)));
    this.where.replaceChildren(...lines);
    this.under.textContent = under ?? "Click pins a patch; then the mouse reads its weights.";
    const top = Math.max(...said.mass.frames.map(({ mass }) => mass), 1e-12);
    const frames = sight.strip ? [] : said.mass.frames.map(({ panel: number, mass }) =>
      bar(`frame ${number}`, mass, mass / top));
    const kinds = Object.entries(said.mass.kinds).map(([kind, mass]) => bar(kind, mass, mass / top));
    this.masses.replaceChildren(...frames, ...kinds);
    this.heading.textContent = state.direction === "row" ? "Strongest keys" : "Strongest queries";
    // Lines stay while they say the same: one of them may have the mouse or the focus.
    if (said === this.said) return;
    this.said = said;
    this.list.replaceChildren(...said.strongest.map((one) => this.strong(one)));
  }

  strong(one) {
    const point = (value) => () => this.on.highlight(value);
    return element("li", {}, element("button", {
      type: "button", onpointerenter: point(one), onpointerleave: point(null),
      onfocus: point(one), onblur: point(null), onclick: () => this.on.pick(one),
    }, element("span", {}, one.text), element("span", { class: "value" }, weightText(one.weight))));
  }

  async copy(what) {
    if (!this.texts) return;
    const text = this.texts[what]();
    try {
      await navigator.clipboard.writeText(text);
      this.copied.textContent = "copied";
    } catch {
      this.copied.textContent = copyByHand(text) ? "copied" : "the browser lets no page copy here";
    }
    setTimeout(() => (this.copied.textContent = ""), 2000);
  }

  text(what) {
    return this.texts?.[what]() ?? null;
  }
}

function copyByHand(text) {
  const area = element("textarea", { readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

function bar(label, mass, part) {
  const fill = element("i");
  fill.style.width = `${100 * Math.min(1, part)}%`;
  return element("div", { class: "bar" }, element("bdi", {}, label), fill,
    element("span", { class: "value" }, weightText(mass)));
}

function jsonOf({ place, state, asked, said }) {
  const { row, col, frame, kind, token, inFrame } = place;
  return {
    site: asked.site, head: state.head, direction: state.direction, batch: asked.item,
    captured_token: asked.token,
    query: { token, token_in_frame: inFrame, frame, kind, row, col },
    sum: said.sum, entropy: said.entropy,
    mass: { frames: said.mass.frames.map((one) => [one.panel, one.mass]), kinds: said.mass.kinds },
    strongest: said.strongest.map(({ token: key, weight, text }) => ({ token: key, weight, text })),
  };
}
