/* softmax(factor * one . many) where `many` stays in halves, [d, stride], and sums are float32.
 *
 * Built by build_kernel.sh; wasm.js calls it. `stride` is a multiple of 16, the room behind the last
 * key is zeros, and all halves are finite: the fast decode takes infinities for numbers. */

#include <wasm_simd128.h>

#define EXPORT(name) __attribute__((export_name(name)))
#define TWO_56 72057594037927936.0f

/* A half's bits, moved to a float's places, are the half times 2^-112 (subnormal ones too). Queries
 * take 2^56 of that and the sums the rest, so that neither overflows nor products vanish. */
static v128_t decoded(v128_t wide) {
  return wasm_v128_and(wasm_i32x4_shl(wide, 13), wasm_i32x4_splat((int)0x8fffe000));
}

EXPORT("products")
void products(const short *many, float *one, int d, int stride, int start, int end, float factor,
              float *out) {
  const v128_t last = wasm_f32x4_splat(factor * TWO_56);
  for (int c = 0; c < d; c++) one[c] *= TWO_56;
  for (int n = start & ~15; n < end; n += 16) {
    v128_t s0 = wasm_f32x4_splat(0), s1 = s0, s2 = s0, s3 = s0;
    const short *at = many + n;
    for (int c = 0; c < d; c++, at += stride) {
      const v128_t x = wasm_v128_load32_splat(one + c);
      const v128_t low = wasm_v128_load(at), high = wasm_v128_load(at + 8);
      s0 = wasm_f32x4_add(s0, wasm_f32x4_mul(x, decoded(wasm_i32x4_extend_low_i16x8(low))));
      s1 = wasm_f32x4_add(s1, wasm_f32x4_mul(x, decoded(wasm_i32x4_extend_high_i16x8(low))));
      s2 = wasm_f32x4_add(s2, wasm_f32x4_mul(x, decoded(wasm_i32x4_extend_low_i16x8(high))));
      s3 = wasm_f32x4_add(s3, wasm_f32x4_mul(x, decoded(wasm_i32x4_extend_high_i16x8(high))));
    }
    wasm_v128_store(out + n, wasm_f32x4_mul(s0, last));
    wasm_v128_store(out + n + 4, wasm_f32x4_mul(s1, last));
    wasm_v128_store(out + n + 8, wasm_f32x4_mul(s2, last));
    wasm_v128_store(out + n + 12, wasm_f32x4_mul(s3, last));
  }
}

/* e^x for x up to a little above 0: 2^n * e^r, |r| <= ln(2)/2, by the series to r^7 / 7!. */
static v128_t power(v128_t x) {
  const v128_t n = wasm_f32x4_nearest(wasm_f32x4_mul(x, wasm_f32x4_splat(1.44269504f)));
  v128_t r = wasm_f32x4_sub(x, wasm_f32x4_mul(n, wasm_f32x4_splat(0.693359375f)));
  r = wasm_f32x4_sub(r, wasm_f32x4_mul(n, wasm_f32x4_splat(-2.12194440e-4f)));
  v128_t sum = wasm_f32x4_splat(1.0f / 5040);
  const float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (int i = 0; i < 7; i++) {
    sum = wasm_f32x4_add(wasm_f32x4_mul(sum, r), wasm_f32x4_splat(terms[i]));
  }
  v128_t bits = wasm_i32x4_trunc_sat_f32x4(n);
  bits = wasm_i32x4_shl(wasm_i32x4_add(bits, wasm_i32x4_splat(127)), 23);
  /* Below the smallest normal float it is 0. */
  return wasm_v128_and(wasm_f32x4_mul(sum, bits), wasm_f32x4_gt(x, wasm_f32x4_splat(-87.0f)));
}

/* Logits [start, end) as weights, in place. */
EXPORT("softmax")
void softmax(float *out, int start, int end) {
  const int first = start & ~15, stop = (end + 15) & ~15;
  for (int n = first; n < start; n++) out[n] = -__builtin_inff();
  for (int n = end; n < stop; n++) out[n] = -__builtin_inff();
  v128_t top = wasm_f32x4_splat(-__builtin_inff());
  for (int n = first; n < stop; n += 4) top = wasm_f32x4_pmax(top, wasm_v128_load(out + n));
  float largest = wasm_f32x4_extract_lane(top, 0);
  const float others[] = {wasm_f32x4_extract_lane(top, 1), wasm_f32x4_extract_lane(top, 2),
                          wasm_f32x4_extract_lane(top, 3)};
  for (int i = 0; i < 3; i++) largest = others[i] > largest ? others[i] : largest;
  top = wasm_f32x4_splat(largest);
  /* Of many thousand terms float32 would lose some. */
  v128_t sums = wasm_f64x2_splat(0);
  for (int n = first; n < stop; n += 4) {
    const v128_t e = power(wasm_f32x4_sub(wasm_v128_load(out + n), top));
    wasm_v128_store(out + n, e);
    sums = wasm_f64x2_add(sums, wasm_f64x2_promote_low_f32x4(e));
    sums = wasm_f64x2_add(sums, wasm_f64x2_promote_low_f32x4(wasm_i32x4_shuffle(e, e, 2, 3, 0, 1)));
  }
  const double sum = wasm_f64x2_extract_lane(sums, 0) + wasm_f64x2_extract_lane(sums, 1);
  const v128_t share = wasm_f32x4_splat((float)(1 / sum));
  for (int n = first; n < stop; n += 4) {
    wasm_v128_store(out + n, wasm_f32x4_mul(wasm_v128_load(out + n), share));
  }
}

/* Logits [start, end) of one key as weights, by the maxima and sums of all rows. */
EXPORT("shares")
void shares(float *out, const float *maxima, const float *sums, int start, int end) {
  const v128_t none = wasm_f32x4_splat(0);
  for (int n = start & ~15; n < end; n += 4) {
    const v128_t sum = wasm_v128_load(sums + n);
    const v128_t e = power(wasm_f32x4_sub(wasm_v128_load(out + n), wasm_v128_load(maxima + n)));
    wasm_v128_store(out + n, wasm_v128_and(wasm_f32x4_div(e, sum), wasm_f32x4_gt(sum, none)));
  }
}
