// Rows and columns by kernel.wasm (kernel.c): halves stay halves, sums are float32.
// `KERNEL_WASM`, its base64, stands in front of the joined script (page.py).

import { fromBase64 } from "./decode.js";

const WASM_PAGE = 65536;
const MOST_WASM_BYTES = 400 * 2 ** 20;
const MOST_WASM_SIDES = 32; // each reserves addresses, of which a browser gives so many

let wasmModule = null; // false where it can't run
const wasmSides = new Map();

const filled = (count) => Math.ceil(count / 16) * 16;

/** Queries or keys of a site in a memory of their own, which goes with them. */
class WasmSide {
  constructor(tensor) {
    const [batch, heads, d, count] = tensor.shape;
    this.tensor = tensor;
    [this.d, this.count, this.stride] = [d, count, filled(count)];
    this.exports = new WebAssembly.Instance(wasmModule).exports;
    let end = filled(this.exports.__heap_base.value);
    const room = (bytes) => (end += filled(bytes)) - filled(bytes);
    this.one = room(4 * d);
    this.out = room(4 * this.stride);
    this.maxima = room(4 * this.stride);
    this.sums = room(4 * this.stride);
    this.many = room(2 * batch * heads * d * this.stride);
    const memory = this.exports.memory;
    memory.grow(Math.max(0, Math.ceil((end - memory.buffer.byteLength) / WASM_PAGE)));
    this.bytes = memory.buffer.byteLength;
    this.there = new Set();
  }

  floats(at, count) {
    return new Float32Array(this.exports.memory.buffer, at, count);
  }

  /** Where a head's halves lie, null where not all are finite: the kernel takes those only. */
  head(index) {
    const { d, count, stride } = this;
    const at = this.many + 2 * index * d * stride;
    if (this.there.has(index)) return at;
    const source = this.tensor.data.subarray(index * d * count, (index + 1) * d * count);
    for (let i = 0; i < source.length; i++) if ((source[i] & 0x7c00) === 0x7c00) return null;
    const target = new Uint16Array(this.exports.memory.buffer, at, d * stride);
    for (let c = 0; c < d; c++) target.set(source.subarray(c * count, (c + 1) * count), c * stride);
    this.there.add(index);
    return at;
  }
}

/** The side of a tensor, made at need; those longest unused go where memory is short. */
function wasmSide(tensor) {
  const side = wasmSides.get(tensor) ?? new WasmSide(tensor);
  wasmSides.delete(tensor);
  wasmSides.set(tensor, side);
  let held = 0;
  for (const { bytes } of wasmSides.values()) held += bytes;
  for (const [oldest, { bytes }] of wasmSides) {
    if (oldest === tensor || (held <= MOST_WASM_BYTES && wasmSides.size <= MOST_WASM_SIDES)) break;
    wasmSides.delete(oldest);
    held -= bytes;
  }
  return side;
}

/** Weights of one vector with those of a matrix of `tensor` in [start, end), Float32Array of all,
 *  zeros outside. `rows` are maxima and sums of a column's rows; null for a row.
 *  Null where WebAssembly can't do it. */
export function wasmWeights(tensor, index, one, factor, start, end, rows) {
  if (wasmModule === false || tensor.dtype !== "float16") return null;
  let side;
  try {
    wasmModule ??= new WebAssembly.Module(fromBase64(KERNEL_WASM));
    side = wasmSide(tensor);
  } catch {
    wasmModule ??= false; // a module that runs stays: memory may be there next time
    return null;
  }
  const many = side.head(index);
  if (many === null) return null;
  const out = new Float32Array(side.count);
  if (start >= end) return out;
  const { products, softmax, shares } = side.exports;
  side.floats(side.one, side.d).set(one);
  products(many, side.one, side.d, side.stride, start, end, factor, side.out);
  if (rows) {
    side.floats(side.maxima, side.count).set(rows[0]);
    side.floats(side.sums, side.count).set(rows[1]);
    shares(side.out, side.maxima, side.sums, start, end);
  } else {
    softmax(side.out, start, end);
  }
  out.set(side.floats(side.out + 4 * start, end - start), start);
  return out;
}
