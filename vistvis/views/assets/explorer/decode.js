// A site's binary as typed arrays: the other half of views/explorer/packing.py.

/** All that decodes, in one function, because a worker is made of its text. */
function decoder() {
  const SIZES = { float16: 2, float32: 4, int32: 4, uint8: 1 };
  const ARRAYS = { float16: Uint16Array, float32: Float32Array, int32: Int32Array, uint8: Uint8Array };
  const MOST_DEFLATED = 1032; // bytes that one byte of deflate can stand for

  const TABLE = new Uint32Array(256).map((_, n) => {
    let value = n;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
    return value;
  });

  function crc32(bytes) {
    let value = 0xffffffff;
    for (let i = 0; i < bytes.length; i++) value = TABLE[(value ^ bytes[i]) & 255] ^ (value >>> 8);
    return (value ^ 0xffffffff) >>> 0;
  }

  async function inflate(bytes, length) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const out = new Uint8Array(length);
    const reader = stream.getReader();
    let filled = 0;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      if (filled + value.length > length) throw new Error("it is longer than its shape says");
      out.set(value, filled);
      filled += value.length;
    }
    if (filled !== length) throw new Error("it is shorter than its shape says");
    return out;
  }

  function joined(planes, size) {
    if (size === 1) return planes.buffer;
    const count = planes.length / size;
    if (size === 2) {
      const out = new Uint16Array(count);
      for (let i = 0; i < count; i++) out[i] = planes[i] | (planes[count + i] << 8);
      return out.buffer;
    }
    const out = new Uint32Array(count);
    const [second, third, fourth] = [count, 2 * count, 3 * count];
    for (let i = 0; i < count; i++) {
      out[i] = planes[i] | (planes[second + i] << 8) | (planes[third + i] << 16)
        | (planes[fourth + i] << 24);
    }
    return out.buffer;
  }

  const whole = (value) => Number.isSafeInteger(value) && value >= 0;

  /** The shapes that the tensors of a site must have. */
  function expected(header) {
    const [batch, heads, queries, keys] = header.shape;
    if (header.tensors.weights) return { weights: header.shape };
    const d = header.tensors.query?.shape?.[2];
    return {
      query: [batch, heads, d, queries],
      key: [batch, heads / header.groups, d, keys],
      rows: [2, batch, heads, queries],
    };
  }

  function check(header) {
    const { shape, tensors, scale } = header;
    if (!Array.isArray(shape) || shape.length !== 4 || !shape.every(whole)) {
      throw new Error("its shape is not (batch, heads, queries, keys)");
    }
    for (const [name, sides] of Object.entries(expected(header))) {
      const found = tensors[name]?.shape;
      if (!found) throw new Error(`it has no ${name}`);
      if (found.length !== sides.length || !sides.every((side, axis) => side === found[axis])) {
        throw new Error(`its ${name} is ${found.join(" × ")} and not ${sides.join(" × ")}`);
      }
    }
    const mask = tensors.mask?.shape;
    if (mask && (mask.length !== 4 || !mask.every((side, axis) => side === 1 || side === shape[axis]))) {
      throw new Error(`its mask ${mask.join(" × ")} does not fit`);
    }
    const scales = Array.isArray(scale) ? scale : [scale];
    const fits = !Array.isArray(scale) || scale.length === shape[1];
    if (!tensors.weights && !(fits && scales.every(Number.isFinite))) {
      throw new Error("its scale is no number for each head");
    }
  }

  async function decode(header, bytes) {
    try {
      if (crc32(bytes) !== header.crc32) throw new Error("its data was changed or cut short");
      check(header);
      const tensors = {};
      for (const [name, { dtype, shape, start, bytes: length }] of Object.entries(header.tensors)) {
        const size = SIZES[dtype];
        const count = shape.reduce((product, side) => product * side, 1);
        if (!size || !shape.every(whole)) throw new Error(`its ${name} is no tensor`);
        if (!whole(start) || !whole(length) || start + length > bytes.length) {
          throw new Error(`its ${name} lies outside of its data`);
        }
        if (count * size > MOST_DEFLATED * length) throw new Error(`its ${name} is too short`);
        const planes = await inflate(bytes.subarray(start, start + length), count * size);
        tensors[name] = { dtype, shape, data: new ARRAYS[dtype](joined(planes, size)) };
      }
      return tensors;
    } catch (error) {
      throw new Error(`${header.name} can't be read: ${error.message}; make the page again`);
    }
  }

  return { crc32, decode };
}

const { crc32: checksum, decode } = decoder();

export function crc32(bytes) {
  return checksum(bytes);
}

/** What a worker decodes, as a function like `decode`; null where workers can't start. */
function startWorker() {
  return new Promise((resolve) => {
    const waiting = new Map();
    const answer = async ({ data: [number, header, bytes] }) => {
      try {
        const tensors = await decode(header, bytes);
        postMessage([number, tensors, null], Object.values(tensors).map((one) => one.data.buffer));
      } catch (error) {
        postMessage([number, null, error.message]);
      }
    };
    const text = `const { decode } = (${decoder})(); onmessage = ${answer}; postMessage(null);`;
    let asked = 0;
    try {
      const url = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
      const worker = new Worker(url);
      worker.onerror = () => {
        for (const { reject } of waiting.values()) reject(new Error("the page's worker stopped"));
        waiting.clear();
        resolve(null);
      };
      worker.onmessage = ({ data }) => {
        if (data === null) {
          URL.revokeObjectURL(url);
          resolve((header, bytes) => new Promise((done, reject) => {
            waiting.set(asked, { done, reject });
            worker.postMessage([asked++, header, bytes]);
          }));
          return;
        }
        const [number, tensors, error] = data;
        const { done, reject } = waiting.get(number);
        waiting.delete(number);
        if (error === null) done(tensors);
        else reject(new Error(error));
      };
    } catch {
      resolve(null);
    }
  });
}

let worker = null;

/** `{name: {shape, dtype, data}}` of a site's bytes; an Error that says what is wrong with them.
 *  float16 stays as its bits, a Uint16Array. */
export async function decodeSite(header, bytes) {
  worker ??= startWorker();
  return ((await worker) ?? decode)(header, bytes);
}

export function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

let halves = null;

/** A number for each of the 65536 patterns of bits of a float16, NaN and infinities as they are. */
export function halfTable() {
  if (halves) return halves;
  halves = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    let value;
    if (exponent === 0) value = fraction * 2 ** -24;
    else if (exponent === 31) value = fraction ? NaN : Infinity;
    else value = (1024 + fraction) * 2 ** (exponent - 25);
    halves[bits] = bits & 32768 ? -value : value;
  }
  return halves;
}
