// The view as a picture: PNG of pixels, SVG of the same with outlines and words as vectors.

import { element } from "./dom.js";

const MARGIN = 12;
const TITLE = 34;
const LUMA = [0.299, 0.587, 0.114];

/** Grey picture times `1 − alpha` under the heat, "screen", as the house style has it. */
async function drawnPanel({ url, canvas, layout, picture }, { alpha, smooth }) {
  const [rows, cols] = layout.grid;
  const [down, across] = layout.patchSize;
  const scale = Math.max(1, Math.round(448 / (cols * across)));
  const made = element("canvas");
  made.width = cols * across * scale;
  made.height = rows * down * scale;
  const context = made.getContext("2d");
  context.fillStyle = "#000";
  context.fillRect(0, 0, made.width, made.height);
  if (url) {
    const image = new Image();
    image.src = url;
    await image.decode();
    context.drawImage(image, 0, 0, made.width, made.height);
    const pixels = context.getImageData(0, 0, made.width, made.height);
    const { data } = pixels;
    const dark = picture.classList.contains("lit") ? 1 - alpha : 1;
    for (let n = 0; n < data.length; n += 4) {
      const grey = LUMA[0] * data[n] + LUMA[1] * data[n + 1] + LUMA[2] * data[n + 2];
      data[n] = data[n + 1] = data[n + 2] = Math.round(grey * dark);
    }
    context.putImageData(pixels, 0, 0);
  }
  if (picture.classList.contains("lit")) {
    context.globalCompositeOperation = "screen";
    context.imageSmoothingEnabled = smooth;
    context.drawImage(canvas, 0, 0, made.width, made.height);
  }
  return made;
}

/** Where everything lies: panels in lines as wide as the view has them. */
async function composed(frames, state, outlines) {
  const drawn = await Promise.all(frames.panels.map((panel) => drawnPanel(panel, state)));
  const tops = frames.panels.map(({ figure }) => figure.offsetTop);
  const perLine = Math.max(1, tops.filter((top) => top === tops[0]).length);
  const width = Math.max(...drawn.map((one) => one.width));
  const height = Math.max(...drawn.map((one) => one.height));
  const lines = Math.ceil(drawn.length / perLine);
  const panels = drawn.map((canvas, n) => ({
    canvas,
    x: MARGIN + (n % perLine) * (width + MARGIN),
    y: TITLE + Math.floor(n / perLine) * (height + MARGIN),
  }));
  const boxes = outlines.filter(({ place }) => place.patch !== null).map((outline) => {
    const { canvas, x, y } = panels[outline.panel];
    const [rows, cols] = frames.panels[outline.panel].layout.grid;
    const [w, h] = [canvas.width / cols, canvas.height / rows];
    return { colour: outline.colour, x: x + outline.place.col * w, y: y + outline.place.row * h, w, h };
  });
  return {
    panels, boxes,
    width: MARGIN + perLine * (width + MARGIN),
    height: TITLE + lines * (height + MARGIN),
  };
}

export async function pngBlob(frames, state, outlines, title) {
  const { panels, boxes, width, height } = await composed(frames, state, outlines);
  const sheet = element("canvas");
  Object.assign(sheet, { width, height });
  const context = sheet.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#222";
  context.font = "15px system-ui, sans-serif";
  context.fillText(title, MARGIN, 22, width - 2 * MARGIN);
  for (const { canvas, x, y } of panels) context.drawImage(canvas, x, y);
  for (const { colour, x, y, w, h } of boxes) {
    for (const [stroke, out] of [["#fff", 1], [colour, -1]]) {
      context.strokeStyle = stroke;
      context.lineWidth = 2;
      context.strokeRect(x - out, y - out, w + 2 * out, h + 2 * out);
    }
  }
  return new Promise((done) => sheet.toBlob(done, "image/png"));
}

export async function svgBlob(frames, state, outlines, title) {
  const { panels, boxes, width, height } = await composed(frames, state, outlines);
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const add = (tag, attributes, text = "") => {
    const made = document.createElementNS(space, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    svg.append(made);
  };
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  add("rect", { width, height, fill: "#fff" });
  add("text", { x: MARGIN, y: 22, "font-family": "sans-serif", "font-size": 15, fill: "#222" }, title);
  for (const { canvas, x, y } of panels) {
    add("image", { href: canvas.toDataURL(), x, y, width: canvas.width, height: canvas.height });
  }
  for (const { colour, x, y, w, h } of boxes) {
    for (const [stroke, out] of [["#fff", 1], [colour, -1]]) {
      add("rect", {
        x: x - out, y: y - out, width: w + 2 * out, height: h + 2 * out, fill: "none", stroke,
        "stroke-width": 2,
      });
    }
  }
  const text = new XMLSerializer().serializeToString(svg);
  return new Blob([text], { type: "image/svg+xml" });
}
