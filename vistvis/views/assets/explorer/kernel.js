// softmax(scale · q Kᵀ + mask) of one query or one key, exactly: sums are float64. With "wasm" for
// `kind` they are float32, several times as fast; masked sites and float32 ones stay with float64.

import { halfTable } from "./decode.js";
import { wasmWeights } from "./wasm.js";

/** One matrix `(N, d)` of `(…, d, N)` as numbers, row after row. */
function rowMajor(tensor, index, d, count) {
  const out = new Float32Array(count * d);
  const start = index * d * count;
  const data = tensor.data;
  const table = tensor.dtype === "float16" ? halfTable() : null;
  for (let c = 0; c < d; c++) {
    const from = start + c * count;
    if (table) for (let n = 0; n < count; n++) out[n * d + c] = table[data[from + n]];
    else for (let n = 0; n < count; n++) out[n * d + c] = data[from + n];
  }
  return out;
}

// Matrices of heads, the last used last: as many as fit.
const MOST_KEPT = 400 * 2 ** 20;
const matrices = new Map();
let kept = 0;
let kernels = 0;

function keptMatrix(name, make) {
  const found = matrices.get(name) ?? make();
  if (!matrices.delete(name)) kept += found.byteLength;
  matrices.set(name, found);
  for (const [oldest, matrix] of matrices) {
    if (kept <= MOST_KEPT || oldest === name) break;
    matrices.delete(oldest);
    kept -= matrix.byteLength;
  }
  return found;
}

/** `scale · one · many[n]` for n in [start, end), four at a time. */
function products(one, many, d, scale, start, end, out) {
  let n = start;
  for (; n + 3 < end; n += 4) {
    const a = n * d;
    const b = a + d;
    const c = b + d;
    const e = c + d;
    let s0 = 0;
    let s1 = 0;
    let s2 = 0;
    let s3 = 0;
    for (let i = 0; i < d; i++) {
      const x = one[i];
      s0 += x * many[a + i];
      s1 += x * many[b + i];
      s2 += x * many[c + i];
      s3 += x * many[e + i];
    }
    out[n] = scale * s0;
    out[n + 1] = scale * s1;
    out[n + 2] = scale * s2;
    out[n + 3] = scale * s3;
  }
  for (; n < end; n++) {
    let sum = 0;
    for (let i = 0; i < d; i++) sum += one[i] * many[n * d + i];
    out[n] = scale * sum;
  }
}

/** A decoded site, which answers for rows and columns. */
export class Kernel {
  constructor(header, tensors) {
    this.header = header;
    this.tensors = tensors;
    [this.batch, this.heads, this.queries, this.keys] = header.shape;
    this.d = tensors.query ? tensors.query.shape[2] : 0;
    this.number = kernels++;
    this.logits = new Float64Array(Math.max(this.queries, this.keys));
  }

  /** Queries or keys of one head, row after row. */
  matrix(side, batch, head) {
    const tensor = this.tensors[side];
    const index = batch * tensor.shape[1] + head;
    const make = () => rowMajor(tensor, index, this.d, tensor.shape[3]);
    return keptMatrix(`${this.number} ${side} ${index}`, make);
  }

  /** One query or key, `(d)`. */
  vector(side, batch, head, token) {
    const { data, shape, dtype } = this.tensors[side];
    const start = (batch * shape[1] + head) * this.d * shape[3] + token;
    const table = dtype === "float16" ? halfTable() : null;
    return Float32Array.from({ length: this.d }, (_, c) => {
      const value = data[start + c * shape[3]];
      return table ? table[value] : value;
    });
  }

  scale(head) {
    const scale = this.header.scale;
    return Array.isArray(scale) ? scale[head] : scale;
  }

  /** The first and the last but one of the tokens that see one another. */
  segment(token) {
    const starts = this.tensors.segments?.data;
    if (!starts) return [0, this.keys];
    let at = 0;
    while (at + 1 < starts.length && starts[at + 1] <= token) at++;
    return [starts[at], at + 1 < starts.length ? starts[at + 1] : this.keys];
  }

  /** What is added to a logit, −Infinity where a key takes no part. */
  added(batch, head, query, key) {
    const mask = this.tensors.mask;
    if (!mask) return 0;
    const at = mask.shape.reduce((sum, side, axis) => {
      const index = side === 1 ? 0 : [batch, head, query, key][axis];
      return sum * side + index;
    }, 0);
    if (mask.dtype === "uint8") return mask.data[at] ? 0 : -Infinity;
    return mask.data[at];
  }

  check(batch, head, token, count, kind) {
    if (kind !== "js" && kind !== "wasm") throw new RangeError(`kernel is "js" or "wasm", got ${kind}`);
    const sides = [["batch", batch, this.batch], ["head", head, this.heads], ["token", token, count]];
    for (const [name, value, size] of sides) {
      if (!Number.isInteger(value) || value < 0 || value >= size) {
        throw new RangeError(`${name} ${value} is outside 0…${size - 1} of ${this.header.name}`);
      }
    }
  }

  /** One query's weights over all keys, Float32Array `(Nk)`; zeros where no key takes part. */
  row(batch, head, token, kind = "js") {
    this.check(batch, head, token, this.queries, kind);
    const count = this.keys;
    const out = new Float32Array(count);
    const given = this.tensors.weights;
    if (given) {
      const start = ((batch * this.heads + head) * this.queries + token) * count;
      out.set(given.data.subarray(start, start + count));
      return out;
    }
    const d = this.d;
    const one = this.vector("query", batch, head, token);
    const group = Math.floor(head / this.header.groups);
    let [start, end] = this.segment(token);
    if (this.header.causal) end = Math.min(end, token + 1);
    if (kind === "wasm" && !this.tensors.mask) {
      const key = this.tensors.key;
      const index = batch * key.shape[1] + group;
      const found = wasmWeights(key, index, one, this.scale(head), start, end, null);
      if (found) return found;
    }
    const many = this.matrix("key", batch, group);
    const logits = this.logits;
    products(one, many, d, this.scale(head), start, end, logits);
    if (this.tensors.mask) {
      for (let n = start; n < end; n++) logits[n] += this.added(batch, head, token, n);
    }
    let largest = -Infinity;
    for (let n = start; n < end; n++) if (logits[n] > largest) largest = logits[n];
    if (largest === -Infinity) return out;
    let sum = 0;
    for (let n = start; n < end; n++) sum += logits[n] = Math.exp(logits[n] - largest);
    const share = 1 / sum;
    for (let n = start; n < end; n++) out[n] = logits[n] * share;
    return out;
  }

  /** What every query gives to one key, Float32Array `(Nq)`, by the kept maxima and sums of rows. */
  column(batch, head, key, kind = "js") {
    this.check(batch, head, key, this.keys, kind);
    const count = this.queries;
    const out = new Float32Array(count);
    const given = this.tensors.weights;
    if (given) {
      const start = (batch * this.heads + head) * count * this.keys + key;
      for (let n = 0; n < count; n++) out[n] = given.data[start + n * this.keys];
      return out;
    }
    const d = this.d;
    const group = Math.floor(head / this.header.groups);
    const one = this.vector("key", batch, group, key);
    let [start, end] = this.segment(key);
    end = Math.min(end, count);
    if (!this.tensors.segments) end = count;
    if (this.header.causal) start = Math.max(start, key);
    const rows = this.tensors.rows.data;
    const index = batch * this.heads + head;
    const first = index * count;
    const sums = rows.length / 2 + first;
    if (kind === "wasm" && !this.tensors.mask) {
      const both = [rows.subarray(first, first + count), rows.subarray(sums, sums + count)];
      const query = this.tensors.query;
      const found = wasmWeights(query, index, one, this.scale(head), start, end, both);
      if (found) return found;
    }
    const many = this.matrix("query", batch, head);
    const logits = this.logits;
    products(one, many, d, this.scale(head), start, end, logits);
    for (let n = start; n < end; n++) {
      const logit = logits[n] + this.added(batch, head, n, key);
      const sum = rows[sums + n];
      out[n] = sum > 0 ? Math.exp(logit - rows[first + n]) / sum : 0;
    }
    return out;
  }
}
