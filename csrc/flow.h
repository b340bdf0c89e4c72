// The mathematics of the flow-RL ops, once, for the host and the device.
//
// The CPU loops and the CUDA kernels call these same lines, and the Triton kernels spell out the
// same sequence, so the noise of a seed and the x_next of a step have the same bits on each of them.
// For that, nothing here may be contracted: compile with -ffp-contract=off, --fmad=false.
//
// A step is affine (see g2rpo_kernels/dynamics.py):
//     mean = a x + b v      x_next = mean + s eps      log_prob = -w mean_N((x_next - mean)^2) + c
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define G2RPO_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define G2RPO_INLINE inline __attribute__((always_inline))
#else
#define G2RPO_INLINE inline
#endif

namespace g2rpo {

G2RPO_INLINE int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

G2RPO_INLINE float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

G2RPO_INLINE float flip_sign(float x, int32_t sign_bit) { return float_of(bits_of(x) ^ sign_bit); }

// ---- Noise: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, as Triton's tl.randn4x ----

struct Words {
  uint32_t w0, w1, w2, w3;
};

// High word of a 32x32-bit product. Kept apart from the low word, so that compilers vectorise both
// in 32-bit lanes.
G2RPO_INLINE uint32_t multiply_high(uint32_t x, uint32_t y) {
  return static_cast<uint32_t>((static_cast<uint64_t>(x) * y) >> 32);
}

// Counter (lo32, hi32, 0, 0) under the key (lo32, hi32) of the seed: elements 4*counter + 0..3.
G2RPO_INLINE Words philox(uint64_t counter, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = multiply_high(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high2 = multiply_high(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ k0;
    c2 = high0 ^ c3 ^ k1;
    c1 = low2;
    c3 = low0;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// 32 random bits -> [0, 1): read as int32, negative values folded onto -x - 1.
G2RPO_INLINE float uniform(uint32_t word) {
  const int32_t x = static_cast<int32_t>(word);
  return static_cast<float>(x ^ (x >> 31)) * 4.6566127342e-10f;
}

// log(u) for 1e-7 <= u < 1, to 1 part in 10^7 also next to 1 (Cephes' logf).
G2RPO_INLINE float log_uniform(float u) {
  const int32_t bits = bits_of(u);
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;  // so that 1/sqrt(2) <= mantissa < sqrt(2)
  const float f = float_of(bits - exponent * 0x800000) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f + -1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f + -1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f + -1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f + -2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  float y = (f * z) * p;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  return (f + y) + e * 0.693359375f;
}

G2RPO_INLINE float square_root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return std::sqrt(x);
#endif
}

// Two uniforms -> two independent standard normals: radius * (cos, sin)(2 pi u2).
G2RPO_INLINE void box_muller(float u1, float u2, float& first, float& second) {
  const float radius = square_root(-2.0f * log_uniform(u1 < 1e-7f ? 1e-7f : u1));
  const float turns = 4.0f * u2;
  const int32_t quadrant = static_cast<int32_t>(turns + 0.5f);
  const float r = (turns - static_cast<float>(quadrant)) * 1.57079632679489662f;
  const float z = r * r;
  float ps = -1.9515295891e-4f * z + 8.3321608736e-3f;
  ps = ps * z + -1.6666654611e-1f;
  const float s = (ps * z) * r + r;
  float pc = 2.443315711809948e-5f * z + -1.388731625493765e-3f;
  pc = pc * z + 4.166664568298827e-2f;
  const float c = (pc * z) * z + (1.0f - 0.5f * z);
  const bool odd = quadrant & 1;
  first = radius * flip_sign(odd ? s : c, ((quadrant + 1) & 2) << 30);
  second = radius * flip_sign(odd ? c : s, (quadrant & 2) << 30);
}

// Elements 4*counter + 0..3 of the noise of one seed.
G2RPO_INLINE void normal4(uint64_t counter, uint64_t seed, float out[4]) {
  const Words w = philox(counter, seed);
  box_muller(uniform(w.w0), uniform(w.w1), out[0], out[1]);
  box_muller(uniform(w.w2), uniform(w.w3), out[2], out[3]);
}

// ---- One step ----

struct Coefficients {
  float a, b, s, w, c;
};

// Row `row` of a table [P, 5], or [1, 5] with stride 0.
G2RPO_INLINE Coefficients coefficients_of(const float* table, int64_t stride, int64_t row) {
  const float* t = table + row * stride;
  return {t[0], t[1], t[2], t[3], t[4]};
}

G2RPO_INLINE float step_mean(Coefficients k, float x, float v) { return k.a * x + k.b * v; }

G2RPO_INLINE float branch(Coefficients k, float mean, float eps) { return mean + k.s * eps; }

// From sum_N((x_next - mean)^2); the one place a log-probability is made.
G2RPO_INLINE float log_prob_of(Coefficients k, float sum_of_squares, int64_t count) {
  return -k.w * (sum_of_squares / static_cast<float>(count)) + k.c;
}

// w * mean_N((mean - mean_other)^2) from sum_N((v - v_other)^2): the latents' share cancels.
G2RPO_INLINE float mean_gap_of(Coefficients k, float sum_of_squares, int64_t count) {
  return k.w * (k.b * k.b) * (sum_of_squares / static_cast<float>(count));
}

// ---- Clipped policy loss ----

// Comparisons are written so that a NaN goes through: it must reach the loss and the gradient.
G2RPO_INLINE float clamp(float x, float low, float high) {
  return x < low ? low : (x > high ? high : x);
}

struct LossOptions {
  float low, high;       // 1 - clip_range, 1 + clip_range
  float clip_range;
  float advantage_clip;  // infinity: none
  float kl_weight;
};

struct BranchLoss {
  float loss;           // max(-A r, -A clip(r))
  float grad_log_prob;  // dloss/dlog_prob, not yet divided by the number of branches
  float ratio, log_ratio;
  float outside;        // 1 if |r - 1| > clip_range
};

// slope: dlog_ratio/dlog_prob; 1, or s with GRPO-Guard's normalised ratio.
G2RPO_INLINE BranchLoss branch_loss(float log_ratio, float advantage, float slope, LossOptions o) {
  const float ratio = expf(log_ratio);
  const float a = clamp(advantage, -o.advantage_clip, o.advantage_clip);
  const float unclipped = -a * ratio;
  const float clipped = -a * clamp(ratio, o.low, o.high);
  const bool is_clipped = unclipped < clipped;
  return {is_clipped ? clipped : unclipped, is_clipped ? 0.0f : unclipped * slope, ratio, log_ratio,
          fabsf(ratio - 1.0f) > o.clip_range ? 1.0f : 0.0f};
}

// Running maximum that keeps a NaN, as torch.max does.
G2RPO_INLINE float max_or_nan(float so_far, float x) { return so_far > x || so_far != so_far ? so_far : x; }

// ---- Gradient of the log-probabilities, one anchor row ----

// grad_v = (2 w b / N) scale [ sum_g grad_g (x_next_g - mean) + (sum_g grad_g) b (v - v_old)
//                              + kl_weight / P  b (v - v_reference) ]
struct GradientFactors {
  float whole;      // (2 w b / N) scale
  float old;        // (sum_g grad_g) b
  float reference;  // kl_weight / P  b
};

G2RPO_INLINE GradientFactors gradient_factors(Coefficients k, int64_t count, float scale,
                                              float sum_of_grads, float kl_weight, int64_t rows) {
  return {2.0f * k.w * k.b / static_cast<float>(count) * scale, sum_of_grads * k.b,
          kl_weight / static_cast<float>(rows) * k.b};
}

// ---- Half precision, as bits ----

G2RPO_INLINE float float_of_bf16(uint16_t h) {
  return float_of(static_cast<int32_t>(static_cast<uint32_t>(h) << 16));
}

// Round to nearest even; NaN stays NaN.
G2RPO_INLINE uint16_t bf16_of(float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x));
  const uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  return static_cast<uint16_t>((x != x ? bits | 0x400000 : rounded) >> 16);
}

G2RPO_INLINE float float_of_f16(uint16_t h) {
  // Exponent and mantissa moved into place, then scaled by 2^112: subnormals come out right.
  const uint32_t shifted = (h & 0x7FFFu) << 13;
  const float magnitude = float_of(static_cast<int32_t>(shifted)) * 5.192296858534828e33f;
  const uint32_t special = (h & 0x7C00u) == 0x7C00u ? 0x7F800000u | ((h & 0x3FFu) << 13) : 0u;
  const uint32_t bits = special ? special : static_cast<uint32_t>(bits_of(magnitude));
  return float_of(static_cast<int32_t>(bits | ((h & 0x8000u) << 16)));
}

// Round to nearest even; overflow to infinity; NaN stays NaN.
G2RPO_INLINE uint16_t f16_of(float x) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(x)), sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Subnormal results: adding 0.5 leaves the rounded value in the low mantissa bits.
  const float small = float_of(static_cast<int32_t>(magnitude)) + 0.5f;
  const uint32_t subnormal = static_cast<uint32_t>(bits_of(small)) - 0x3F000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1)) >> 13;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x47800000u ? 0x7C00u : h;
  h = magnitude > 0x7F800000u ? 0x7E00u : h;
  return static_cast<uint16_t>(sign | h);
}

}  // namespace g2rpo
