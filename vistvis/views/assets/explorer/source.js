// Where a page's sites come from. A source has `manifest`, `image(batch, frame)` (a URL or null)
// and `bytes(number)`, a promise of a site's binary.

import { crc32, fromBase64 } from "./decode.js";

/** What a page carries in inert script tags; its sites from beside it where it was made so. */
export function pageSource(root = document) {
  const text = (id) => root.getElementById(id)?.textContent ?? null;
  const json = text("vistvis-manifest");
  const said = Number(root.getElementById("vistvis-manifest").dataset.crc32);
  if (crc32(new TextEncoder().encode(json)) !== said) {
    throw new Error("this page was changed or cut short; make it again");
  }
  const manifest = JSON.parse(json);
  const fetched = "folder" in root.getElementById("vistvis-explorer").dataset;
  return {
    manifest,
    image: (batch, frame) => text(`vistvis-image-${batch}-${frame}`),
    bytes: async (number) => {
      const headers = [...manifest.sites, ...(manifest.against?.sites ?? [])];
      if (fetched) return fetchedSite(headers[number], number);
      const tag = await readTag(root, `vistvis-site-${number}`);
      if (!tag) throw new Error("this page was cut short; make it again");
      return fromBase64(tag.textContent);
    },
  };
}

/** A tag of a page that may still be read, when all of it is there; null if it never is. */
async function readTag(root, id) {
  for (;;) {
    const whole = root.readyState !== "loading";
    const tag = root.getElementById(id);
    if (whole || tag?.nextElementSibling) return tag;
    await new Promise((done) => setTimeout(done, 10));
  }
}

async function fetchedSite(header, number) {
  const file = `site-${number}-${header.crc32.toString(16).padStart(8, "0")}.bin`;
  let answer;
  try {
    answer = await fetch(file);
  } catch {
    const how = "it is opened over http: vistvis explore --serve, or python -m http.server";
    throw new Error(`${file}, the data of ${header.name}, can't be reached; ${how}`);
  }
  if (!answer.ok) {
    throw new Error(`${file}, the data of ${header.name}, is not there (${answer.status})`);
  }
  return new Uint8Array(await answer.arrayBuffer());
}

/** What a notebook's kernel has: `model` is anywidget's. */
export function modelSource(model) {
  const waiting = new Map();
  model.on("msg:custom", ({ site, error }, buffers) => {
    const { resolve, reject } = waiting.get(site) ?? {};
    waiting.delete(site);
    if (error) reject?.(new Error(error));
    else resolve?.(new Uint8Array(buffers[0].buffer, buffers[0].byteOffset, buffers[0].byteLength));
  });
  const pictures = model.get("pictures");
  return {
    manifest: model.get("manifest"),
    image: (batch, frame) => pictures[`${batch}-${frame}`] ?? null,
    bytes: (number) =>
      new Promise((resolve, reject) => {
        waiting.set(number, { resolve, reject });
        const asleep = () => reject(new Error("the kernel does not answer; run the cell again"));
        setTimeout(asleep, 120000);
        model.send({ site: number });
      }),
  };
}
