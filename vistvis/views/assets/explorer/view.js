// The view: its state, the query, and what is painted for it.

import { download, element, weightText } from "./dom.js";
import { Sight, overScene, samePlace } from "./scene.js";
import { Layout } from "./layout.js";
import { colourTables } from "./colours.js";
import { checkedState, hashState, stateHash } from "./state.js";
import { Frames, QUERY, fittingSize, pinColour } from "./frames.js";
import { Numbers, placeText, reading } from "./numbers.js";
import { Multiples } from "./multiples.js";
import { ColourBar, fillControls } from "./controls.js";
import { actsOf, helpDialog, pressed } from "./keys.js";
import { pngBlob, svgBlob } from "./save.js";
import { aboutFold, pinList } from "./words.js";

export class View {
  /** `alone`: in a page of its own, whose hash and keys are ours. */
  constructor(root, source, kernel, alone) {
    Object.assign(this, { root, source, kernel, alone, loaded: new Map(), listeners: new Set() });
    const { manifest } = source;
    this.layout = manifest.layout ? new Layout(manifest.layout) : null;
    this.sights = new Map(manifest.sites.map((header) => [header.name, new Sight(this.layout, header)]));
    this.cmaps = colourTables(manifest);
    this.hover = this.highlight = this.answer = null;
    this.build();
    this.start = manifest.start ?? {};
    this.state = this.fromStart(alone ? hashState(location.hash) : {});
    this.state.size ??= this.fitting();
    if (alone) addEventListener("hashchange", () => this.fromHash());
  }

  build() {
    const { manifest } = this.source;
    const region = (name, label) => element("section", { class: name, "aria-label": label });
    const frames = element("div", {
      class: "frames", tabindex: "0", role: "application",
      "aria-label": "Frames: arrow keys move the query, question mark lists all keys",
      onwheel: (event) => this.wheel(event),
    });
    this.message = element("p", { class: "message", role: "alert" });
    this.live = element("p", { class: "live", "aria-live": "polite" });
    this.what = element("div", { class: "what" });
    this.look = element("div", { class: "look" });
    const wide = innerWidth > 760;
    const fold = element("details", { open: wide }, element("summary", {}, "Look and save"), this.look);
    this.bar = region("colourbar", "Colour scale");
    this.pins = region("pins", "Pins");
    const numbers = region("numbers", "Numbers");
    const small = region("multiples", "Small maps");
    this.help = helpDialog();
    this.panes = element("div", { class: "panes" });
    this.main = element("main", {}, this.message, frames, this.panes, small);
    this.root.classList.add("vistvis");
    this.root.replaceChildren(
      element("header", {}, element("h1", {}, element("bdi", {}, manifest.title)), this.what, fold),
      element("div", { class: "body" }, this.main,
        element("aside", {}, this.bar, this.pins, numbers, aboutFold(manifest))),
      this.live, this.help);
    this.colourBar = new ColourBar(this.bar);
    this.frames = new Frames(frames, this.source, {
      hover: (hit) => this.point(hit), pick: (hit) => hit && this.pick(hit),
    });
    this.numbers = new Numbers(numbers, {
      highlight: (one) => { this.highlight = one; this.schedule(); },
      pick: (one) => this.askFor(this.outlineOf(one)),
    });
    this.multiples = new Multiples(small, (value) => this.set(value));
    this.onkey = (event) => {
      const here = this.root.contains(event.target);
      if (!here && !(this.alone && event.target === document.body)) return;
      if (pressed(event, this.acts)) event.preventDefault();
    };
    (this.alone ? document : this.root).addEventListener("keydown", this.onkey);
  }

  fitting() {
    const [rows, cols] = this.layout?.grid ?? [1, 1];
    const [down, across] = this.layout?.patchSize ?? [1, 1];
    const clientWidth = this.frames.root.clientWidth;
    const sight = this.sights.get(this.state.site);
    if (!sight || sight.strip || innerWidth <= 760) return Math.min(700, clientWidth);
    const aspect = (cols * across) / (rows * down);
    return fittingSize(this.layout.frames, aspect, clientWidth, innerHeight - 180, 14);
  }

  get acts() { return actsOf(this); }
  get sight() { return this.sights.get(this.state.site); }
  get locked() { return this.state.pins.includes(this.state.token); }
  get asking() { return this.sight.asking(this.state.direction); }

  /** The query: what lies under the mouse, or, where that is pinned or away, the state's. */
  get token() {
    if (this.locked || !this.hover || !this.asksAt(this.hover)) return this.state.token;
    return this.hover.token;
  }

  asksAt({ panel }) {
    return !this.sight.strip || panel === this.sight.askingPanel(this.state.direction, 0);
  }

  /** Changes the state, which is set right where it does not fit the site. */
  set(change) {
    if (!this.sights.size) return;
    if (change.site !== undefined && !this.sights.has(change.site)) {
      throw new Error(`this page has no site ${change.site}; it has ${[...this.sights.keys()].join(", ")}`);
    }
    const turned = "direction" in change && this.sight.strip;
    this.state = checkedState({ ...this.state, ...change, ...(turned ? { pins: [] } : {}) },
      this.sights, this.cmaps);
    this.refresh();
  }

  fromStart(state) {
    return checkedState({ ...this.start, ...state }, this.sights, this.cmaps);
  }

  fromHash() {
    const state = this.fromStart(hashState(location.hash));
    state.size ??= this.state.size;
    this.state = state;
    this.refresh();
  }

  refresh() {
    const { state } = this;
    fillControls(this, { state, sights: this.sights, cmaps: this.cmaps,
      set: (change) => this.set(change), act: this.acts });
    this.frames.build(this.sight, state.direction, state.batch);
    this.frames.root.style.setProperty("--size", `${state.size}px`);
    const pinFocused = this.pins.contains(document.activeElement);
    pinList(this.pins, this);
    if (pinFocused) this.frames.root.focus();
    if (this.alone) {
      clearTimeout(this.hashing);
      this.hashing = setTimeout(() => history.replaceState(null, "", stateHash(this.state, this.start)), 150);
    }
    this.schedule();
    this.showMultiples();
  }

  point(hit) {
    this.hover = hit;
    this.schedule();
  }

  pick(hit) {
    if (!this.asksAt(hit)) return;
    const { pins } = this.state;
    if (pins.includes(hit.token)) {
      const rest = pins.filter((token) => token !== hit.token);
      this.set({ pins: rest, token: this.locked && hit.token !== this.state.token ? this.state.token : hit.token });
    } else this.set({ pins: [...pins, hit.token], token: hit.token });
  }

  /** The newest event only, inside requestAnimationFrame. */
  schedule() {
    this.due ??= requestAnimationFrame(() => {
      this.due = null;
      this.draw();
    });
  }

  /** A site's kernel, kept; until it is there the page says so. */
  async load(name) {
    if (!this.loaded.has(name)) this.loaded.set(name, await this.kernel(name));
    return this.loaded.get(name);
  }

  /** `{asked, field}` of a token at a site that is loaded; an Error says why there is none. */
  answerOf(name, token, head, kernel = this.loaded.get(name)) {
    const sight = this.sights.get(name);
    const { direction, batch } = this.state;
    const asked = sight.ask(direction, kernel.tensors, token, batch);
    const call = (n) => {
      const values = kernel[direction](asked.item, n, asked.token);
      let sum = 0;
      for (let i = 0; i < values.length; i++) sum += values[i];
      if (Number.isFinite(sum)) return values;
      throw new Error(`${name} has NaN or infinite weights here`);
    };
    const heads = sight.header.shape[1];
    if (typeof head === "number") {
      return { asked: { ...asked, site: name }, field: asked.field(call(head)) };
    }
    const first = call(0);
    const sum = Float64Array.from(first);
    for (let n = 1; n < heads; n++) {
      const row = call(n);
      if (head === "mean") for (let i = 0; i < sum.length; i++) sum[i] += row[i];
      else for (let i = 0; i < sum.length; i++) if (row[i] > sum[i]) sum[i] = row[i];
    }
    const share = head === "mean" ? 1 / heads : 1;
    const values = Float32Array.from(sum, (value) => value * share);
    return { asked: { ...asked, site: name }, field: asked.field(values) };
  }

  draw() {
    const { state, sight } = this;
    if (!sight) return this.say("this page has no site to show");
    if (!this.loaded.has(state.site)) {
      this.root.setAttribute("aria-busy", "true");
      // What there is belongs to the site before.
      if (this.answer) {
        this.answer = null;
        for (const listener of this.listeners) this.tell(listener);
      }
      const wanted = state.site;
      this.load(wanted).then(() => this.schedule(),
        (error) => this.state.site === wanted && this.say(error.message));
      return;
    }
    this.root.removeAttribute("aria-busy");
    const { site, head, direction, batch } = state;
    const question = JSON.stringify([site, head, direction, batch, this.token]);
    const other = question !== this.question || !this.answer;
    try {
      if (other) this.answer = this.answerOf(site, this.token, head);
    } catch (error) {
      return this.say(error.message);
    }
    this.question = question;
    this.say("");
    const { field, asked } = this.answer;
    const place = this.asking.locate(this.token);
    const panel = place.frame === null ? null : sight.askingPanel(state.direction, place.frame);
    const own = place.patch === null || (sight.strip && sight.panels > 1) ? null : { panel, ...place };
    const table = this.cmaps.get(state.cmap);
    const { maps, scales, shared } = this.frames.paint(field, state, own, table);
    const used = shared ?? scales.get(panel) ?? [...scales.values()][0];
    if (used) {
      const counted = shared ? maps : maps.filter((map) => scales.get(map.panel) === used);
      const largest = counted.reduce((most, { values }) => values.reduce((m, v) => (v > m ? v : m), most), 0);
      this.colourBar.show(used, largest, table, !shared && scales.size > 1);
    }
    if (other) this.said = reading(field, sight);
    this.outlines = this.outlined(place, panel);
    this.frames.mark(this.outlines);
    this.numbers.show({ place, panel, sight, state, asked, said: this.said,
      under: this.underMouse(field), manifest: this.source.manifest });
    const colours = JSON.stringify([state.norm, state.cmap]);
    if (other || colours !== this.colours) for (const listener of this.listeners) this.tell(listener);
    this.colours = colours;
    if (other) this.announce(place, panel);
  }

  tell(listener) {
    if (!this.answer || !this.layout || this.sight.strip) return listener(null, null);
    listener(overScene(this.answer.field, this.layout), this.asking.locate(this.token));
  }

  outlined(place, panel) {
    const { state, sight } = this;
    const out = state.pins.map((token, nth) => {
      const pinned = this.asking.locate(token);
      const at = pinned.frame === null ? null : sight.askingPanel(state.direction, pinned.frame);
      return { panel: at, place: pinned, colour: pinColour(nth), kind: "pin" };
    });
    const nth = state.pins.indexOf(this.token);
    const colour = nth < 0 ? QUERY : pinColour(nth);
    const key = this.highlight ? this.outlineOf(this.highlight) : this.locked ? this.hovered() : null;
    if (key) out.push({ ...key, colour: "#ffffff", kind: "key" });
    return [...out, { panel, place, colour, kind: "query" }];
  }

  hovered() {
    if (!this.hover) return null;
    const { panel, token } = this.hover;
    const side = this.state.direction === "row" ? "key" : "query";
    return { panel, place: (this.sight.strip ? this.sight.sides[side] : this.layout).locate(token) };
  }

  /** Where one of the strongest lies in the scene, to be outlined. */
  outlineOf({ place, panel }) {
    const { layout } = this.answer.field;
    const other = !this.sight.strip && panel !== null && !layout.equals(this.layout);
    const alike = String(layout.grid) === String(this.layout?.grid) || place.patch === null;
    const found = other && alike ? samePlace(place, layout, this.layout, panel) : place;
    return { panel, place: found ?? place, grid: layout.grid };
  }

  askFor({ place, panel }) {
    if (this.asksAt({ panel })) this.set({ token: place.token });
  }

  underMouse(field) {
    if (!this.locked) return null;
    const key = this.highlight ? this.outlineOf(this.highlight) : this.hovered();
    if (!key) return "Point at a patch to read its weight.";
    if (this.sight.strip && !field.panels.includes(key.panel)) return null;
    const values = this.sight.strip ? field.values : overScene(field, this.layout);
    const weight = values[key.place.token];
    return `${placeText(key.place, key.panel, this.sight)} gets ${weightText(weight)}`
      .replace("gets", this.state.direction === "row" ? "gets" : "gives");
  }

  announce(place, panel) {
    clearTimeout(this.announcing);
    this.announcing = setTimeout(() => {
      const [top] = this.said.strongest;
      const best = top ? `strongest ${top.text}, ${weightText(top.weight)}` : "no weight";
      this.live.textContent = `${placeText(place, panel, this.sight)}; ${best}`;
    }, 500);
  }

  /** A plain message in the page; the heat of before goes, since it is not what was asked. */
  say(text) {
    this.message.textContent = text;
    this.root.removeAttribute("aria-busy");
    if (text) {
      this.answer = null;
      this.frames.clear();
      for (const listener of this.listeners) this.tell(listener);
    }
  }

  showMultiples() {
    const { multiples, head, direction, batch, token, norm, cmap, site } = this.state;
    const asked = JSON.stringify([multiples, head, direction, batch, token, norm, cmap, site]);
    if (asked === this.multiplied) return;
    this.multiplied = asked;
    clearTimeout(this.multiplying);
    if (multiples === "none") return void this.multiples.clear();
    this.multiplying = setTimeout(() => {
      const field = async (name, n) => (await this.load(name), this.answerOf(name, token, n).field);
      const { panels, header } = this.sight;
      const heads = Array.from({ length: header.shape[1] }, (_, n) => ({
        value: { head: n }, label: `head ${n}`, current: n === head, panels, field: () => field(site, n),
      }));
      const sites = [...this.sights.values()].map(({ name, panels: own }) => ({
        value: { site: name }, label: name, current: name === site, panels: own,
        field: () => field(name, head),
      }));
      const place = this.asking.locate(token);
      const own = place.patch === null ? null : { panel: place.frame, ...place };
      this.multiples.show(multiples === "heads" ? heads : sites, norm, own, this.cmaps.get(cmap));
    }, 60);
  }

  wheel(event) {
    if (!event.ctrlKey) return;
    event.preventDefault();
    this.acts.zoom(event.deltaY < 0 ? 1.1 : 1 / 1.1);
  }

  async save(kind) {
    const { state, sight } = this;
    const place = this.asking.locate(this.token);
    const head = typeof state.head === "number" ? `head ${state.head}` : `${state.head} of heads`;
    const where = placeText(place, place.frame, sight);
    const title = `${state.site} · ${head} · ${state.direction === "row" ? "query" : "key"} ${where}`;
    const make = kind === "png" ? pngBlob : svgBlob;
    const blob = await make(this.frames, state, this.outlines ?? [], title);
    download(`attention.${kind}`, blob);
    return blob;
  }
}
