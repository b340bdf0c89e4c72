// AdamW8bit on a CPU: loops over the arithmetic of adamw8bit.h.
//
// A block of a parameter is read, stepped and written while it lies in the first-level cache, so a
// pass moves every byte once. Blocks do not know of one another: the bits depend neither on the
// threads nor on how the parameters are cut among them.
#include <algorithm>
#include <cstring>
#include <vector>

#include "clones.h"
#include "ops.h"

namespace g2rpo::cpu {
namespace {

constexpr int64_t largest_block = 1024;
constexpr int64_t parallel_from = 8192;  // elements; below, waking threads costs more than it gains

constexpr DynamicCode signed_code(true), unsigned_code(false);

// ---- Loops over one block ----

G2RPO_CLONES void scale_f32(const float* in, float scale, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * scale;
}

G2RPO_CLONES void scale_bf16(const uint16_t* in, float scale, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_bf16(in[i]) * scale;
}

G2RPO_CLONES void scale_f16(const uint16_t* in, float scale, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = float_of_f16(in[i]) * scale;
}

G2RPO_CLONES void decode_dynamic(const float* value, const uint8_t* codes, float scale, float* out,
                                 int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = value[codes[i]] * scale;
}

G2RPO_CLONES void decode_fp8(const uint8_t* codes, float scale, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = decode_e4m3(codes[i]) * scale;
}

// Scales are found as bits, whose order is that of magnitudes, with NaN above all.
G2RPO_CLONES void step_moments(const AdamwConstants& k, const float* g, float* m, float* v,
                               int64_t n, float& m_scale, float& v_scale) {
  int32_t m_max = 0, v_max = 0;
#pragma omp simd reduction(max : m_max, v_max)
  for (int64_t i = 0; i < n; ++i) {
    float m_i = m[i], v_i = v[i];
    adamw_moments(k, g[i], m_i, v_i);
    m[i] = m_i, v[i] = v_i;
    m_max = std::max(m_max, bits_of(m_i) & 0x7FFFFFFF);
    v_max = std::max(v_max, bits_of(v_i) & 0x7FFFFFFF);
  }
  m_scale = float_of(m_max), v_scale = float_of(v_max);
}

G2RPO_CLONES void step_weights(const AdamwConstants& k, const float* in, const float* m,
                               const float* v, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = adamw_weight(k, in[i], m[i], v[i]);
}

G2RPO_CLONES void encode_dynamic_signed(const float* x, float inverse, uint8_t* codes, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = encode_signed(signed_code, x[i], inverse);
}

G2RPO_CLONES void encode_dynamic_unsigned(const float* x, float inverse, uint8_t* codes, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = encode_unsigned(unsigned_code, x[i], inverse);
}

G2RPO_CLONES void encode_fp8(const float* x, float inverse, uint8_t* codes, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) codes[i] = encode_e4m3(x[i], inverse);
}

// 16 bits an element, of 8 * calls elements; `counter` is that of the first eight.
G2RPO_CLONES void random_halves(uint64_t counter, uint64_t seed, uint16_t* out, int64_t calls) {
  alignas(64) uint32_t w0[largest_block / 8], w1[largest_block / 8];
  alignas(64) uint32_t w2[largest_block / 8], w3[largest_block / 8];
#pragma omp simd
  for (int64_t i = 0; i < calls; ++i) {
    const Words w = philox(counter + static_cast<uint64_t>(i), seed);
    w0[i] = w.w0, w1[i] = w.w1, w2[i] = w.w2, w3[i] = w.w3;
  }
#pragma omp simd
  for (int64_t i = 0; i < calls; ++i) {
    const Words w = {w0[i], w1[i], w2[i], w3[i]};
    for (int e = 0; e < 8; ++e) out[8 * i + e] = static_cast<uint16_t>(random_half(w, e));
  }
}

G2RPO_CLONES void join_16(const uint16_t* weight, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = join_master(weight[i], 0, 0);
}

G2RPO_CLONES void join_24(const uint16_t* weight, const int8_t* low, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = join_master(weight[i], low[i], 8);
}

G2RPO_CLONES void join_32(const uint16_t* weight, const int16_t* low, float* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = join_master(weight[i], low[i], 16);
}

G2RPO_CLONES void split_16(const float* w, const uint16_t* random, uint16_t* weight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    int32_t rest;
    split_master(round_master(w[i], 0, random[i]), 0, weight[i], rest);
  }
}

G2RPO_CLONES void split_24(const float* w, const uint16_t* random, uint16_t* weight, int8_t* low,
                           int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    int32_t rest;
    split_master(round_master(w[i], 8, random[i]), 8, weight[i], rest);
    low[i] = static_cast<int8_t>(rest);
  }
}

G2RPO_CLONES void split_32(const float* w, uint16_t* weight, int16_t* low, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    int32_t rest;
    split_master(round_master(w[i], 16, 0), 16, weight[i], rest);
    low[i] = static_cast<int16_t>(rest);
  }
}

// ---- One block ----

struct Buffers {
  alignas(64) float g[largest_block], m[largest_block], v[largest_block], w[largest_block];
  alignas(64) uint16_t random[largest_block];
};

template <class T>
T* at(void* array, int64_t offset) {
  return static_cast<T*>(array) + offset;
}

void read_grad(const Adamw8bit& a, const AdamwTensor& t, int64_t offset, int64_t n, float* out) {
  const float scale = a.constants.grad_scale;
  if (a.grad_dtype == Dtype::float32) {
    scale_f32(at<float>(t.grad, offset), scale, out, n);
  } else if (a.grad_dtype == Dtype::bfloat16) {
    scale_bf16(at<uint16_t>(t.grad, offset), scale, out, n);
  } else {
    scale_f16(at<uint16_t>(t.grad, offset), scale, out, n);
  }
  if (a.zero_grad) {
    const int64_t size = a.grad_dtype == Dtype::float32 ? 4 : 2;
    std::memset(at<char>(t.grad, offset * size), 0, static_cast<size_t>(n * size));
  }
}

void decode(bool dynamic, const DynamicCode& code, const uint8_t* codes, float scale, float* out,
            int64_t n) {
  if (dynamic)
    decode_dynamic(code.value, codes, scale, out, n);
  else
    decode_fp8(codes, scale, out, n);
}

void encode(const Adamw8bit& a, const AdamwTensor& t, int64_t block, int64_t offset, int64_t n,
            const Buffers& b) {
  const float m_inverse = inverse_scale_of(t.exp_avg_scale[block]);
  const float v_inverse = inverse_scale_of(t.exp_avg_sq_scale[block]);
  if (a.dynamic) {
    encode_dynamic_signed(b.m, m_inverse, t.exp_avg + offset, n);
    encode_dynamic_unsigned(b.v, v_inverse, t.exp_avg_sq + offset, n);
  } else {
    encode_fp8(b.m, m_inverse, t.exp_avg + offset, n);
    encode_fp8(b.v, v_inverse, t.exp_avg_sq + offset, n);
  }
}

void step_param(const Adamw8bit& a, const AdamwTensor& t, int64_t offset, int64_t n, Buffers& b) {
  if (a.param_dtype == Dtype::float32) {
    float* w = at<float>(t.param, offset);
    return step_weights(a.constants, w, b.m, b.v, w, n);
  }
  uint16_t* weight = at<uint16_t>(t.param, offset);
  if (a.low_bytes == 0) {
    join_16(weight, b.w, n);
  } else if (a.low_bytes == 1) {
    join_24(weight, at<int8_t>(t.low_bits, offset), b.w, n);
  } else {
    join_32(weight, at<int16_t>(t.low_bits, offset), b.w, n);
  }
  step_weights(a.constants, b.w, b.m, b.v, b.w, n);
  if (a.low_bytes == 2) return split_32(b.w, weight, at<int16_t>(t.low_bits, offset), n);
  random_halves(static_cast<uint64_t>(t.first + offset) / 8, t.seed, b.random, (n + 7) / 8);
  if (a.low_bytes == 1)
    split_24(b.w, b.random, weight, at<int8_t>(t.low_bits, offset), n);
  else
    split_16(b.w, b.random, weight, n);
}

void step_block(const Adamw8bit& a, const AdamwTensor& t, int64_t block, Buffers& b) {
  const int64_t offset = block * a.block_size, n = std::min(a.block_size, t.count - offset);
  read_grad(a, t, offset, n, b.g);
  decode(a.dynamic, signed_code, t.exp_avg + offset, t.exp_avg_scale[block], b.m, n);
  decode(a.dynamic, unsigned_code, t.exp_avg_sq + offset, t.exp_avg_sq_scale[block], b.v, n);
  step_moments(a.constants, b.g, b.m, b.v, n, t.exp_avg_scale[block], t.exp_avg_sq_scale[block]);
  encode(a, t, block, offset, n, b);
  step_param(a, t, offset, n, b);
}

}  // namespace

void adamw8bit(const Adamw8bit& a) {
  // Chunks of all tensors in a row: tensor t has those from first[t] to first[t + 1].
  std::vector<int64_t> first(static_cast<size_t>(a.tensor_count) + 1, 0);
  [[maybe_unused]] int64_t work = 0;
  for (int64_t t = 0; t < a.tensor_count; ++t) {
    first[t + 1] = first[t] + (a.tensors[t].count + adamw_chunk - 1) / adamw_chunk;
    work += a.tensors[t].count;
  }
#pragma omp parallel for schedule(dynamic) if (work >= parallel_from)
  for (int64_t chunk = 0; chunk < first.back(); ++chunk) {
    const auto after = std::upper_bound(first.begin(), first.end(), chunk);
    const AdamwTensor& t = a.tensors[after - first.begin() - 1];
    const int64_t from = (chunk - *(after - 1)) * adamw_chunk;
    const int64_t to = std::min(from + adamw_chunk, t.count);
    Buffers buffers;
    for (int64_t block = from / a.block_size; block * a.block_size < to; ++block)
      step_block(a, t, block, buffers);
  }
}

}  // namespace g2rpo::cpu
