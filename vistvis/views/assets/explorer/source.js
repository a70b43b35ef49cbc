// Where a page's sites come from. A source has `manifest`, `image(batch, frame)` (a URL or null)
// and `bytes(number)`, a promise of a site's binary.

import { crc32, fromBase64 } from "./decode.js";

/** Everything in inert script tags of the page itself. */
export function pageSource(root = document) {
  const text = (id) => root.getElementById(id)?.textContent ?? null;
  const json = text("vistvis-manifest");
  const said = Number(root.getElementById("vistvis-manifest").dataset.crc32);
  if (crc32(new TextEncoder().encode(json)) !== said) {
    throw new Error("this page was changed or cut short; make it again");
  }
  return {
    manifest: JSON.parse(json),
    image: (batch, frame) => text(`vistvis-image-${batch}-${frame}`),
    bytes: async (number) => fromBase64(text(`vistvis-site-${number}`)),
  };
}
