// A site's binary as typed arrays: the other half of views/explorer/packing.py.

const TABLE = new Uint32Array(256).map((_, n) => {
  let value = n;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

export function crc32(bytes) {
  let value = 0xffffffff;
  for (let i = 0; i < bytes.length; i++) value = TABLE[(value ^ bytes[i]) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

export function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

async function inflate(bytes, length) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const out = new Uint8Array(length);
  const reader = stream.getReader();
  let filled = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (filled + value.length > length) throw new Error("it is longer than it says");
    out.set(value, filled);
    filled += value.length;
  }
  if (filled !== length) throw new Error("it is shorter than it says");
  return out;
}

const SIZES = { float16: 2, float32: 4, int32: 4, uint8: 1 };
const ARRAYS = { float16: Uint16Array, float32: Float32Array, int32: Int32Array, uint8: Uint8Array };

function joined(planes, size) {
  if (size === 1) return planes;
  const count = planes.length / size;
  const bytes = new Uint8Array(planes.length);
  for (let place = 0; place < size; place++) {
    const start = place * count;
    for (let i = 0, at = place; i < count; i++, at += size) bytes[at] = planes[start + i];
  }
  return bytes;
}

/** `{name: {shape, dtype, data}}` of a site's bytes; an Error that says what is wrong with them.
 *  float16 stays as its bits, a Uint16Array. */
export async function decodeSite(header, bytes) {
  if (crc32(bytes) !== header.crc32) {
    throw new Error(`the data of ${header.name} was changed or cut short; make the page again`);
  }
  const tensors = {};
  for (const [name, { dtype, shape, start, bytes: length }] of Object.entries(header.tensors)) {
    const size = SIZES[dtype];
    const count = shape.reduce((product, side) => product * side, 1);
    const planes = await inflate(bytes.subarray(start, start + length), count * size);
    tensors[name] = { dtype, shape, data: new ARRAYS[dtype](joined(planes, size).buffer) };
  }
  return tensors;
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
