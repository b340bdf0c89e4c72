// Loops over one tile of a row, vectorised for the machine that runs them.
//
// The innermost sums run over a fixed number of lanes, so their bits do not depend on the width of
// the machine's vectors.
#pragma once

#include <algorithm>

#include "clones.h"
#include "ops.h"

namespace g2rpo::cpu {
namespace {

constexpr int64_t tile_size = 1024;  // 4 KiB: a mean, an x_next and a gradient stay in L1
constexpr int lanes = 64;           // partial sums a tile

// ---- Loops over one tile of n <= tile_size elements ----

G2RPO_CLONES void widen_bf16(const uint16_t* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_bf16(in[i]);
}

G2RPO_CLONES void widen_f16(const uint16_t* in, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_f16(in[i]);
}

G2RPO_CLONES void narrow_bf16(const float* in, uint16_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_of(in[i]);
}

G2RPO_CLONES void narrow_f16(const float* in, uint16_t* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = f16_of(in[i]);
}

G2RPO_CLONES void mean_tile(Coefficients k, const float* x, const float* v, float* mean, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) mean[i] = step_mean(k, x[i], v[i]);
}

G2RPO_CLONES void euler_tile(float delta, const float* x, const float* v, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] + delta * v[i];
}

G2RPO_CLONES void branch_tile(Coefficients k, const float* mean, const float* eps, float* x_next,
                              int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x_next[i] = branch(k, mean[i], eps[i]);
}

// Asks for 64 floats of what is read next. The hardware's own prefetch ends at every page of 4 KiB,
// and the next branch may lie a whole row further on. An address that is not mapped does no harm.
// Measured at 12 x 2025 x 64: the gradient takes 20 % less time with it, the loss 5 to 12 %.
G2RPO_INLINE void prefetch64(const float* next) {
#if defined(__GNUC__)
  for (int line = 0; line < 64; line += 16) __builtin_prefetch(next + line);
#else
  (void)next;
#endif
}

// sum (x - y)^2, in a fixed order. Every log-probability of this backend is made of these sums.
// next: what is read after x.
G2RPO_CLONES float square_sum_tile(const float* x, const float* y, const float* next, int64_t n) {
  float sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    prefetch64(next + i);
#pragma omp simd
    for (int lane = 0; lane < lanes; ++lane) {
      const float gap = x[i + lane] - y[i + lane];
      sums[lane] += gap * gap;
    }
  }
  for (int lane = 0; i < n; ++i, ++lane) {
    const float gap = x[i] - y[i];
    sums[lane] += gap * gap;
  }
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
  }
  return sums[0];
}

// total += grad * (x_next - mean); next: what is read after x_next.
G2RPO_CLONES void add_gap_tile(float grad, const float* x_next, const float* mean,
                               const float* next, float* total, int64_t n) {
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    prefetch64(next + i);
#pragma omp simd
    for (int64_t j = i; j < i + lanes; ++j) total[j] += grad * (x_next[j] - mean[j]);
  }
#pragma omp simd
  for (int64_t j = i; j < n; ++j) total[j] += grad * (x_next[j] - mean[j]);
}

G2RPO_CLONES void scale_tile(float factor, float* total, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) total[i] *= factor;
}

// Noise of elements first .. first + n of a seed; first is a multiple of 4. The integers and the
// floats are made in loops of their own: mixed, 64-bit products and floats vectorise badly.
G2RPO_CLONES void normal_tile(uint64_t seed, int64_t first, float* out, int64_t n) {
  constexpr int block = 128;  // counters
  alignas(64) uint32_t w0[block], w1[block], w2[block], w3[block];
  alignas(64) float noise[4 * block];
  for (int64_t done = 0; done < n; done += 4 * block) {
    const uint64_t counter = static_cast<uint64_t>((first + done) / 4);
    const int64_t left = std::min<int64_t>(n - done, 4 * block);
    const int counters = static_cast<int>((left + 3) / 4);
#pragma omp simd
    for (int i = 0; i < counters; ++i) {
      const Words w = philox(counter + static_cast<uint64_t>(i), seed);
      w0[i] = w.w0, w1[i] = w.w1, w2[i] = w.w2, w3[i] = w.w3;
    }
    float* to = left == 4 * block ? out + done : noise;
#pragma omp simd
    for (int i = 0; i < counters; ++i) {
      float z0, z1, z2, z3;
      box_muller(uniform(w0[i]), uniform(w1[i]), z0, z1);
      box_muller(uniform(w2[i]), uniform(w3[i]), z2, z3);
      to[4 * i] = z0, to[4 * i + 1] = z1, to[4 * i + 2] = z2, to[4 * i + 3] = z3;
    }
    if (to == noise) std::copy(noise, noise + left, out + done);
  }
}

// ---- Arrays of any of the three types, as floats ----

// n floats from `offset` on: the array's own, or converted into `buffer`.
const float* read(Array array, int64_t offset, int64_t n, float* buffer) {
  switch (array.dtype) {
    case Dtype::bfloat16:
      widen_bf16(static_cast<const uint16_t*>(array.data) + offset, buffer, n);
      return buffer;
    case Dtype::float16:
      widen_f16(static_cast<const uint16_t*>(array.data) + offset, buffer, n);
      return buffer;
    default:
      return static_cast<const float*>(array.data) + offset;
  }
}

void write(const float* values, int64_t n, void* out, Dtype dtype, int64_t offset) {
  switch (dtype) {
    case Dtype::bfloat16:
      return narrow_bf16(values, static_cast<uint16_t*>(out) + offset, n);
    case Dtype::float16:
      return narrow_f16(values, static_cast<uint16_t*>(out) + offset, n);
    default:
      std::copy(values, values + n, static_cast<float*>(out) + offset);
  }
}

}  // namespace
}  // namespace g2rpo::cpu
