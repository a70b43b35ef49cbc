// The page: `mount(element, source)` puts an explorer into an element.
//
// For panes beside the frames (3-D points, two runs against one another): `view.onRow(listener)`
// calls `listener(values, query)` whenever other weights are shown. `values` is a Float32Array over
// the scene's tokens (`source.manifest.layout`), NaN where the site says nothing; null where there
// is no answer, or the site has no layout. `query` is the place asked for, as `Layout.locate` gives
// it, `{token, frame, kind, row, col, …}`. It returns a function that ends it. `view.ask(token)`
// previews a token of the scene as the mouse does (null ends that), `view.pick(token)` pins it as
// a click does. `view.panes` is the element for panes.

import { Against } from "./against.js";
import { cloudPane } from "./cloud.js";
import { decodeSite } from "./decode.js";
import { Kernel } from "./kernel.js";
import { pageSource } from "./source.js";
import { View } from "./view.js";

/** The kernels of a source's sites, each decoded when it is first asked for. */
export function kernelsOf(source, sites = source.manifest.sites, first = 0) {
  const numbers = new Map(sites.map((header, number) => [header.name, number]));
  const kept = new Map();
  return (name) => {
    if (!numbers.has(name)) return Promise.reject(new Error(`this page has no site ${name}`));
    if (!kept.has(name)) {
      const number = numbers.get(name);
      const header = sites[number];
      const load = async () =>
        new Kernel(header, await decodeSite(header, await source.bytes(first + number)));
      kept.set(name, load());
    }
    return kept.get(name);
  };
}

export function mount(element, source) {
  const kernel = kernelsOf(source);
  const shown = new View(element, source, kernel, element.id === "vistvis-explorer");
  const view = {
    panes: shown.panes,
    onRow: (listener) => {
      shown.listeners.add(listener);
      shown.tell(listener);
      return () => shown.listeners.delete(listener);
    },
    ask: (token) => shown.point(token === null ? null : { panel: 0, token }),
    pick: (token) => shown.pick({ panel: 0, token }),
  };
  const { manifest } = source;
  if (manifest.points && shown.layout) {
    const { layout, cmaps } = shown;
    const colours = () => ({ norm: shown.state.norm, table: cmaps.get(shown.state.cmap) });
    const onQuery = (token, pinned) => (pinned ? view.pick(token) : view.ask(token));
    view.cloud = cloudPane(view.panes, { manifest, source, layout, onQuery, colours });
    view.onRow((values, query) => view.cloud.show(values, query?.token));
  }
  if (manifest.against && shown.layout) {
    const other = kernelsOf(source, manifest.against.sites, manifest.sites.length);
    view.against = new Against(shown, other, manifest.against.labels, view);
    view.onRow((values, query) => view.against.show(values, query));
  }
  if (shown.sight) shown.refresh();
  shown.schedule();
  return {
    // First painted, or the message that says why not.
    ready: new Promise((done) => {
      const look = () => (shown.answer || shown.message.textContent ? done() : setTimeout(look, 5));
      look();
    }),
    sites: source.manifest.sites.map(({ name, shape, site }) => ({ name, shape, kind: site?.kind })),
    row: async ({ site, batch = 0, head = 0, token, kernel: kind }) =>
      (await kernel(site)).row(batch, head, token, kind),
    column: async ({ site, batch = 0, head = 0, key, kernel: kind }) =>
      (await kernel(site)).column(batch, head, key, kind),
    get state() { return structuredClone(shown.state); },
    set: (change) => shown.set(change),
    text: (kind) => shown.numbers.text(kind),
    picture: (kind) => shown.save(kind),
    view,
  };
}

if (document.getElementById("vistvis-manifest")) {
  const element = document.getElementById("vistvis-explorer");
  try {
    window.vistvis = mount(element, pageSource());
  } catch (error) {
    element.textContent = error.message;
    window.vistvis = { ready: Promise.resolve(), sites: [], error: error.message };
  }
}
