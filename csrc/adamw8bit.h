// AdamW on 8-bit moments and bfloat16 weights with extra bits, once, for the host and the device.
//
// Moments are codes of 8 bits with one float32 scale a block, the block's largest magnitude: Dettmers
// et al. 2022 (arXiv 2110.02861), whose dynamic code this is, or e4m3. Every line rounds once and
// nothing is contracted, so that all backends and g2rpo_kernels/optim/arithmetic.py have the same bits.
#pragma once

#include "flow.h"

namespace g2rpo {

// Of one step of one parameter group, each rounded once from float64 (optim/arithmetic.py: constants).
struct AdamwConstants {
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float step_size;       // lr / (1 - beta1^t)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  float eps;
  float decay;  // 1 - lr * weight_decay
  float grad_scale;
};

// ---- The codes ----

// Dettmers' dynamic code, of |x| / scale in [0, 1]: seven decades 10^(d-6) (.1, 1], each cut into n
// equal steps whose middles are the values, n = 2^d (signed) or 2^(d+1); beyond them 0 and 1. With
// index q = n + step, decades, steps and signs stand in one another's order.
constexpr int decades = 7;
constexpr double ten_to[decades] = {1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0};

constexpr double dynamic_value(int decade, int steps, int step) {
  return ten_to[decade] * (0.1 + 0.9 * (step + 0.5) / steps);
}

// Piecewise: |y| >= from[s - 1] is in segment s, where q = min(slope y + offset, last), truncated. The
// first segment is 0, the last is 1. Between two decades the border lies in the middle.
struct DynamicCode {
  float from[decades + 1] = {};
  float slope[decades + 2] = {}, offset[decades + 2] = {}, last[decades + 2] = {};
  float value[256] = {};  // by code

  constexpr explicit DynamicCode(bool with_sign) {
    const int first = with_sign ? 1 : 2;  // steps of the first decade
    offset[0] = last[0] = static_cast<float>(first) - 0.5f;
    double below = 0;
    for (int d = 0; d < decades; ++d) {
      const int steps = first << d;
      from[d] = static_cast<float>((below + dynamic_value(d, steps, 0)) / 2);
      slope[d + 1] = static_cast<float>(steps / (0.9 * ten_to[d]));
      offset[d + 1] = static_cast<float>(steps * 8.0 / 9.0);
      last[d + 1] = static_cast<float>(2 * steps) - 0.5f;
      below = dynamic_value(d, steps, steps - 1);
      for (int i = 0; i < steps; ++i) {
        const float x = static_cast<float>(dynamic_value(d, steps, i));
        if (with_sign) {
          value[127 + steps + i] = x;
          value[127 - steps - i] = -x;
        } else {
          value[steps + i - 1] = x;
        }
      }
    }
    from[decades] = static_cast<float>((below + 1) / 2);
    offset[decades + 1] = last[decades + 1] = static_cast<float>(first << decades) + 0.5f;
    value[255] = 1;
  }
};

// Index q of a magnitude y >= 0 relative to its block's scale. y may exceed 1 by rounding.
G2RPO_INLINE int dynamic_index(const DynamicCode& code, float y) {
  float slope = code.slope[0], offset = code.offset[0], last = code.last[0];
  for (int s = 0; s <= decades; ++s) {
    const bool in = y >= code.from[s];
    slope = in ? code.slope[s + 1] : slope;
    offset = in ? code.offset[s + 1] : offset;
    last = in ? code.last[s + 1] : last;
  }
  const float q = y * slope + offset;
  return static_cast<int>(q < last ? q : last);
}

// 127 is 0; above it the positive values, the last of them 1; below it the negative, which lack -1.
G2RPO_INLINE uint8_t encode_signed(const DynamicCode& code, float x, float inverse_scale) {
  const float y = x * inverse_scale;
  const int q = dynamic_index(code, y < 0 ? -y : y);
  const int negative = q < 127 ? q : 127;
  return static_cast<uint8_t>(y < 0 ? 127 - negative : 127 + q);
}

G2RPO_INLINE uint8_t encode_unsigned(const DynamicCode& code, float x, float inverse_scale) {
  return static_cast<uint8_t>(dynamic_index(code, x * inverse_scale) - 1);
}

// e4m3 of 448 x / scale, to nearest, ties to even.
G2RPO_INLINE uint8_t encode_e4m3(float x, float inverse_scale) {
  const float y = (x * inverse_scale) * 448.0f;
  const int32_t bits = bits_of(y), magnitude = bits & 0x7FFFFFFF;
  // Below 2^-6 steps of 2^-9: adding 2^14 leaves just these.
  const int32_t fixed = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000;
  const int32_t rounded = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960;
  const int32_t code = magnitude < 0x3C800000 ? fixed : rounded;
  return static_cast<uint8_t>((code < 126 ? code : 126) | ((bits >> 24) & 0x80));
}

G2RPO_INLINE float decode_e4m3(uint8_t code) {
  const int32_t exponent = (code >> 3) & 15, fraction = code & 7;
  const float normal = float_of(((exponent + 120) << 23) | (fraction << 20));
  const float y = exponent ? normal : static_cast<float>(fraction) * 0.001953125f;
  return flip_sign(y, static_cast<int32_t>(static_cast<uint32_t>(code & 0x80) << 24)) *
         (1.0f / 448.0f);
}

// A block of zeros, or of what has no reciprocal, gets codes of 0.
G2RPO_INLINE float inverse_scale_of(float scale) {
  return scale >= 1.1754943508222875e-38f ? 1.0f / scale : 0.0f;
}

// ---- The step ----

// m and v of before, in; those of after, out. g: the gradient times grad_scale.
G2RPO_INLINE void adamw_moments(const AdamwConstants& k, float g, float& m, float& v) {
  m = k.beta1 * m + k.one_minus_beta1 * g;
  v = k.beta2 * v + (k.one_minus_beta2 * g) * g;
}

G2RPO_INLINE float adamw_weight(const AdamwConstants& k, float w, float m, float v) {
  return w * k.decay - (m * k.step_size) / (square_root(v) * k.inv_sqrt_bias2 + k.eps);
}

// ---- Weights of more bits than bfloat16 ----
//
// A master is a bfloat16, the nearest, and what it lacks of the master's bits (read as an integer,
// which orders magnitudes): -128..127 of the next 8 bits, or -32768..32767 of the next 16.

G2RPO_INLINE float join_master(uint16_t weight, int32_t low, int low_bits) {
  // Nothing lies below zero: someone else has written this weight.
  if ((weight & 0x7FFF) == 0 && low < 0) low = 0;
  const uint32_t bits = (static_cast<uint32_t>(weight) << 16) +
                        (static_cast<uint32_t>(low) << (16 - low_bits));
  return float_of(static_cast<int32_t>(bits));
}

// Bits of w rounded to bfloat16 and `low_bits` more: up with the probability of what is cut off.
// random: 16 bits. low_bits 16 is exact.
G2RPO_INLINE uint32_t round_master(float w, int low_bits, uint32_t random) {
  const int cut = 16 - low_bits;
  const uint32_t up = cut ? random >> (16 - cut) : 0;
  return (static_cast<uint32_t>(bits_of(w)) + up) >> cut;
}

// From those bits to the nearest bfloat16 and the rest.
G2RPO_INLINE void split_master(uint32_t bits, int low_bits, uint16_t& weight, int32_t& low) {
  const uint32_t half = low_bits ? 1u << (low_bits - 1) : 0;
  const uint32_t nearest = (bits + half) >> low_bits;
  weight = static_cast<uint16_t>(nearest);
  low = static_cast<int32_t>(bits - (nearest << low_bits));
}

// 16 random bits for element e of a parameter; eight elements share one Philox call.
G2RPO_INLINE uint32_t random_half(const Words& words, int element) {
  const uint32_t pair = (element & 4) ? ((element & 2) ? words.w3 : words.w2)
                                      : ((element & 2) ? words.w1 : words.w0);
  return (element & 1) ? pair >> 16 : pair & 0xFFFF;
}

}  // namespace g2rpo
