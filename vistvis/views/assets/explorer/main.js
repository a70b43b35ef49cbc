// The page: `mount(element, source)` puts an explorer into an element.

import { decodeSite } from "./decode.js";
import { Kernel } from "./kernel.js";
import { pageSource } from "./source.js";

/** The kernels of a source's sites, each decoded when it is first asked for. */
export function kernelsOf(source) {
  const numbers = new Map(source.manifest.sites.map((header, number) => [header.name, number]));
  const kept = new Map();
  return (name) => {
    if (!numbers.has(name)) return Promise.reject(new Error(`this page has no site ${name}`));
    if (!kept.has(name)) {
      const number = numbers.get(name);
      const header = source.manifest.sites[number];
      const load = async () => new Kernel(header, await decodeSite(header, await source.bytes(number)));
      kept.set(name, load());
    }
    return kept.get(name);
  };
}

export function mount(element, source) {
  const kernel = kernelsOf(source);
  element.textContent = source.manifest.title;
  return {
    ready: Promise.resolve(),
    sites: source.manifest.sites.map(({ name, shape, site }) => ({ name, shape, kind: site?.kind })),
    row: async ({ site, batch = 0, head = 0, token, kernel: kind }) =>
      (await kernel(site)).row(batch, head, token, kind),
    column: async ({ site, batch = 0, head = 0, key, kernel: kind }) =>
      (await kernel(site)).column(batch, head, key, kind),
  };
}

if (document.getElementById("vistvis-manifest")) {
  window.vistvis = mount(document.getElementById("vistvis-explorer"), pageSource());
}
