// The patches of all frames as one cloud of points, coloured by what a query sees.

import { heightOf, scaleOf } from "./colours.js";
import { Cloud, Eye, quantile } from "./cloudview.js";
import { fromBase64 } from "./decode.js";
import { button, element, slider } from "./dom.js";

const CLOUD_WIDTH = 1024; // of the texture of colours
const DIM = 0.55;

const SEEN = `#version 300 es
uniform mat3 turn; uniform vec3 eye; uniform vec2 focal; uniform vec2 reach; uniform float pixels;
vec4 seen(vec3 point) {
  vec3 c = turn * (point - eye);
  float depth = (reach.y + reach.x) * c.z - 2.0 * reach.y * reach.x;
  return vec4(focal.x * c.x, -focal.y * c.y, depth / (reach.y - reach.x), c.z);
}`;
const POINT_VERTEX = `${SEEN}
layout(location = 0) in vec3 point; layout(location = 1) in float size;
layout(location = 2) in vec3 base;
uniform sampler2D heat; out vec3 colour;
void main() {
  gl_Position = seen(point);
  gl_PointSize = clamp(1.1 * size * pixels / gl_Position.w, 2.0, 40.0);
  vec4 hot = texelFetch(heat, ivec2(gl_VertexID % ${CLOUD_WIDTH}, gl_VertexID / ${CLOUD_WIDTH}), 0);
  colour = mix(${DIM} * base, hot.rgb, hot.a);
  // Frames show the same places: of points that lie at one, the hot one comes in front.
  gl_Position.z -= 0.0008 * hot.a * gl_Position.w;
}`;
const LINE_VERTEX = `${SEEN}
layout(location = 0) in vec3 point; uniform vec3 paint; out vec3 colour;
void main() { gl_Position = seen(point); colour = paint; }`;
const FRAGMENT = `#version 300 es
precision mediump float; in vec3 colour; out vec4 shown;
void main() { shown = vec4(colour, 1.0); }`;

function program(gl, vertex) {
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  if (!gl.getProgramParameter(made, gl.LINK_STATUS) && !gl.isContextLost()) {
    throw new Error(`the 3-D view can't be drawn here: ${gl.getProgramInfoLog(made)}`);
  }
  return made;
}

/** Mean colours of the patches, `(count, 3)` in 0…1; grey where there is no picture. */
async function patchColours(source, layout) {
  const [rows, cols] = layout.grid;
  const colours = new Float32Array(layout.frames * layout.patches * 3).fill(0.7);
  const canvas = element("canvas", { width: cols, height: rows });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  for (let frame = 0; frame < layout.frames; frame++) {
    const url = source.image(0, frame);
    if (!url) continue;
    const picture = element("img", { src: url });
    await picture.decode();
    context.drawImage(picture, 0, 0, cols, rows);
    const { data } = context.getImageData(0, 0, cols, rows);
    for (let n = 0; n < layout.patches; n++) {
      const at = 3 * (frame * layout.patches + n);
      for (let i = 0; i < 3; i++) colours[at + i] = data[4 * n + i] / 255;
    }
  }
  return colours;
}

/** The buffers and programs of a cloud; `draw` and `colour` it. */
class CloudPainter {
  constructor(gl, cloud, eye) {
    Object.assign(this, { gl, cloud, eye });
    this.points = { program: program(gl, POINT_VERTEX), array: gl.createVertexArray() };
    this.lines = { program: program(gl, LINE_VERTEX), array: gl.createVertexArray() };
    gl.bindVertexArray(this.points.array);
    this.attribute(0, 3, cloud.positions);
    this.attribute(1, 1, cloud.sizes);
    this.base = this.attribute(2, 3, new Float32Array(cloud.count * 3).fill(0.7));
    this.order = gl.createBuffer();
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, this.order);
    gl.bindVertexArray(this.lines.array);
    const length = 0.12 * eye.radius;
    const frusta = cloud.cameras.flatMap((camera) => cloud.frustum(camera, length));
    this.attribute(0, 3, new Float32Array(frusta));
    this.lines.count = frusta.length / 3;
    this.texels = new Uint8Array(4 * CLOUD_WIDTH * Math.ceil(cloud.count / CLOUD_WIDTH));
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    for (const name of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) {
      gl.texParameteri(gl.TEXTURE_2D, name, gl.NEAREST);
    }
    this.upload();
    gl.enable(gl.DEPTH_TEST);
  }

  attribute(location, width, values) {
    const { gl } = this;
    const buffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
    gl.enableVertexAttribArray(location);
    gl.vertexAttribPointer(location, width, gl.FLOAT, false, 0, 0);
    return buffer;
  }

  upload() {
    const { gl, texels } = this;
    const height = texels.length / 4 / CLOUD_WIDTH;
    const kind = [gl.RGBA, gl.UNSIGNED_BYTE];
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA8, CLOUD_WIDTH, height, 0, ...kind, texels);
  }

  paintBase(colours) {
    const { gl } = this;
    gl.bindBuffer(gl.ARRAY_BUFFER, this.base);
    gl.bufferData(gl.ARRAY_BUFFER, colours, gl.STATIC_DRAW);
  }

  show(among) {
    const { gl } = this;
    gl.bindVertexArray(this.points.array);
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, Uint32Array.from(among), gl.DYNAMIC_DRAW);
    this.points.count = among.length;
  }

  /** Heat over the points, the clearer the larger; on the scale of the frames together. */
  colour(values, token, { norm, table }) {
    const { cloud, texels } = this;
    const { layout } = cloud;
    const place = layout.locate(token);
    const maps = Array.from({ length: layout.frames }, (_, panel) => {
      const start = layout.patchToken(panel, 0, 0);
      return { panel, grid: layout.grid, values: values.subarray(start, start + layout.patches) };
    });
    const own = place.patch === null ? null : { panel: place.frame, ...place };
    const scale = scaleOf(maps, norm, own);
    texels.fill(0);
    for (let n = 0; n < cloud.count; n++) {
      const height = heightOf(scale, values[cloud.token(n)]);
      if (!(height > 0)) continue;
      const step = 3 * Math.min(255, Math.floor(height * 256));
      for (let i = 0; i < 3; i++) texels[4 * n + i] = height > 1 + 1e-6 ? 255 : table[step + i];
      texels[4 * n + 3] = Math.min(255, 600 * height);
    }
    this.upload();
  }

  clear() {
    this.texels.fill(0);
    this.upload();
  }

  draw(ratio, paint) {
    const { gl, eye } = this;
    gl.viewport(0, 0, gl.drawingBufferWidth, gl.drawingBufferHeight);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    for (const [part, mode] of [[this.lines, gl.LINES], [this.points, gl.POINTS]]) {
      if (!part.count) continue;
      gl.useProgram(part.program);
      const place = (name) => gl.getUniformLocation(part.program, name);
      gl.uniformMatrix3fv(place("turn"), true, eye.turn);
      gl.uniform3fv(place("eye"), eye.eye);
      gl.uniform2f(place("focal"), (2 * eye.focal) / eye.width, (2 * eye.focal) / eye.height);
      gl.uniform2f(place("reach"), eye.distance / 100, eye.distance * 100);
      gl.uniform1f(place("pixels"), eye.focal * ratio);
      gl.uniform3fv(place("paint"), paint);
      gl.bindVertexArray(part.array);
      if (mode === gl.POINTS) gl.drawElements(mode, part.count, gl.UNSIGNED_INT, 0);
      else gl.drawArrays(mode, 0, part.count);
    }
  }
}

/** What moves the eye: dragging, wheel, two fingers, and keys. `asked(x, y, pinned)` is told of
 *  places pointed at or clicked; `changed()` of a new view. */
function steer(canvas, eye, { asked, changed }) {
  const fingers = new Map();
  let moved = 0;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const spread = () => {
    const [[ax, ay], [bx, by]] = fingers.values();
    return [(ax + bx) / 2, (ay + by) / 2, Math.hypot(ax - bx, ay - by) || 1];
  };
  const act = (change) => (event) => { if (change(event) !== false) changed(); };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (!fingers.size) moved = 0;
    fingers.set(event.pointerId, place(event));
  });
  canvas.addEventListener("pointermove", act((event) => {
    const now = place(event);
    const before = fingers.get(event.pointerId);
    if (!before) {
      asked(...now, false);
      return false;
    }
    const [x, y] = [now[0] - before[0], now[1] - before[1]];
    moved += Math.abs(x) + Math.abs(y);
    if (fingers.size === 2) {
      const old = spread();
      fingers.set(event.pointerId, now);
      const [cx, cy, apart] = spread();
      eye.pan(cx - old[0], cy - old[1]);
      eye.zoom(old[2] / apart);
      return true;
    }
    fingers.set(event.pointerId, now);
    if (moved < 4) return false;
    if (event.shiftKey || event.buttons > 1) eye.pan(x, y);
    else eye.orbit(x * 0.008, y * 0.008);
    return true;
  }));
  for (const end of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(end, (event) => {
      const alone = fingers.size === 1 && fingers.delete(event.pointerId);
      fingers.delete(event.pointerId);
      if (alone && end === "pointerup" && moved < 4 && event.button === 0) asked(...place(event), true);
    });
  }
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("wheel", act((event) => {
    event.preventDefault();
    eye.zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.04 : 0.0012)));
  }), { passive: false });
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const keys = {
    "+": () => eye.zoom(0.85),
    "=": () => eye.zoom(0.85),
    "-": () => eye.zoom(1 / 0.85),
    0: () => eye.reset(),
    Enter: () => asked(eye.width / 2, eye.height / 2, true),
  };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = arrows[event.key];
    if (arrow && event.shiftKey) eye.pan(30 * arrow[0], 30 * arrow[1]);
    else if (arrow) eye.orbit(0.1 * arrow[0], 0.1 * arrow[1]);
    else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
    event.stopPropagation(); // the page has arrows of its own
    changed();
  });
}

const NAME =
  "3-D view of the patches. Arrows turn it, Shift with arrows moves it, plus and minus zoom, " +
  "0 sets it back, Enter asks for the patch in the middle.";

/** A pane of the manifest's points. `onQuery(token, pinned)` is called with the patch that is
 *  pointed at (null: none any more) or clicked. `show(values, token)` colours the points by values
 *  over the scene's tokens (NaN: none; null: no values at all), in the `{norm, table}` that `colours()` gives, and rings
 *  the query. */
export function cloudPane(parent, { manifest, source, layout, onQuery, colours }) {
  const canvas = element("canvas", { tabindex: "0", role: "img", "aria-label": NAME });
  const labels = element("div", { class: "cloud-labels", "aria-hidden": "true" });
  const stage = element("div", { class: "cloud-stage" }, canvas, labels);
  const tools = element("div", { class: "cloud-tools" });
  const pane = element("div", { class: "cloud" }, stage, tools);
  parent.append(pane);
  const gl = canvas.getContext("webgl2", { antialias: true, preserveDrawingBuffer: true });
  const plain = (text) => stage.replaceChildren(element("p", { class: "cloud-note" }, text));
  if (!gl) {
    plain("The 3-D view needs WebGL2, which this browser does not offer; try another one.");
    return { show() {}, destroy: () => pane.remove() };
  }
  const cloud = new Cloud(manifest.points, layout, fromBase64);
  const eye = new Eye(cloud);
  const painter = new CloudPainter(gl, cloud, eye);
  let among = cloud.finite;
  painter.show(among);
  let ring = null; // the query's point
  let last = null; // the token asked for last by pointing
  let frame = 0;

  const numbers = cloud.cameras.map((_, n) => element("span", {}, String(n)));
  const mark = element("i", { class: "cloud-query" });
  labels.append(mark, ...numbers);
  const put = (label, point) => {
    const [x, y, depth] = point ? eye.project(point) : [0, 0, 0];
    label.hidden = !(depth > 0 && x > 0 && y > 0 && x < eye.width && y < eye.height);
    label.style.translate = `${x}px ${y}px`;
  };
  const draw = () => {
    frame = 0;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [stage.clientWidth, stage.clientHeight];
    if (!width || !height || gl.isContextLost()) return;
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
    eye.size(width, height);
    const paint = getComputedStyle(canvas).color.match(/[\d.]+/g).slice(0, 3);
    painter.draw(ratio, paint.map((part) => part / 255));
    numbers.forEach((label, n) => put(label, cloud.cameras[n].place));
    put(mark, ring === null || !cloud.at(ring).every(Number.isFinite) ? null : cloud.at(ring));
  };
  const changed = () => { frame ||= requestAnimationFrame(draw); };
  const asked = (x, y, pinned) => {
    const found = eye.pick(x, y, among);
    canvas.style.cursor = found === null ? "grab" : "crosshair";
    if (found === null || (!pinned && found === last)) return;
    last = found;
    onQuery(cloud.token(found), pinned);
  };
  steer(canvas, eye, { asked, changed });
  canvas.addEventListener("pointerleave", () => {
    last = null;
    onQuery(null, false);
  });
  canvas.addEventListener("webglcontextlost", () =>
    plain("The 3-D view was lost by the graphics card; load the page again."));

  tools.append(button("Reset view", () => { eye.reset(); changed(); }));
  if (cloud.confidence) {
    const sorted = Float32Array.from(cloud.finite, (n) => cloud.confidence[n]).sort();
    tools.append(slider("Hide the least sure, %", [0, 99, 1], 0, (percent) => {
      const least = percent ? quantile(sorted, percent / 100) : -Infinity;
      among = cloud.finite.filter((n) => !percent || cloud.confidence[n] >= least);
      painter.show(among);
      changed();
    }));
  }
  if (manifest.points.left_out) {
    const text = `${manifest.points.left_out} of ${cloud.count} patches have no finite point and are left out`;
    tools.append(element("span", { class: "cloud-note" }, text));
  }
  const watch = new ResizeObserver(changed);
  watch.observe(stage);
  const ready = patchColours(source, layout).then((colours) => {
    painter.paintBase(colours);
    changed();
  });
  return {
    ready,
    eye,
    cloud,
    painter,
    redraw: changed,
    show(values, token) {
      if (values) painter.colour(values, token, colours());
      else painter.clear();
      ring = values ? cloud.point(token) : null;
      changed();
    },
    destroy() {
      cancelAnimationFrame(frame);
      watch.disconnect();
      pane.remove();
      gl.getExtension("WEBGL_lose_context")?.loseContext();
    },
  };
}
