// AdamW8bit's kernel: a block of threads steps one chunk of one parameter, 2048 elements at a time,
// 8 consecutive ones a thread. Every byte is read once and written once.
//
// 64 registers a thread, so that a multiprocessor has 4 blocks: 32 warps, enough loads in flight to
// keep the memory busy. Fewer registers would spill.
#pragma once

#include "adamw8bit_weights.cuh"

namespace g2rpo::cuda {

constexpr int adamw_threads = 256;
constexpr int adamw_warps = adamw_threads / 32;
constexpr int adamw_blocks_at_once = 4;
constexpr int pass_elements = adamw_threads * thread_elements;

// ---- One step, without branches ----
//
// nvcc's own square root and quotient, less what they do with arguments for which these few
// instructions round wrongly. Where there might be such, the weight is NaN or smaller than
// least_weight; a thread looks at its 8 weights once, and takes the long way for all of them.

constexpr float least_weight = 0x1p-32f;

// x from 2^-101 on; NaN of infinity.
G2RPO_DEVICE float root_in_range(float x) {
  const float r = approximate_rsqrt(x), root = x * r;
  return fmaf(fmaf(-root, root, x), 0.5f * r, root);
}

// NaN where the quotient overflows. Wrong, by far less than 2^-58, where it is below 2^-125 or x is
// below 2^-100, if y is 2^-40 or more: too little to change a weight of 2^-33, whatever its sign.
G2RPO_DEVICE float quotient_in_range(float x, float y) {
  float r = approximate_reciprocal(y);
  r = fmaf(r, fmaf(-y, r, 1.0f), r);
  const float q = x * r;
  return fmaf(r, fmaf(-y, q, x), q);
}

// adamw_weight. The root is taken of 2^64 v, since v may be as small as 2^-149; what is added to
// that changes only roots below 2^-70, which are nothing beside eps.
// root_factor: inv_sqrt_bias2 2^-32, or NaN where eps is too small for all this.
G2RPO_DEVICE float fast_weight(const AdamwConstants& k, float root_factor, float w, float m,
                               float v) {
  const float root = root_in_range(fmaf(v, 0x1p64f, 0x1p-101f));
  return w * k.decay - quotient_in_range(m * k.step_size, root * root_factor + k.eps);
}

template <class Codec>
G2RPO_DEVICE void step_moments(const AdamwConstants& k, const Codec& codec, const Eight& grad,
                               const Packed<1>& m_codes, const Packed<1>& v_codes, float m_scale,
                               float v_scale, Eight& m, Eight& v) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    m.at[j] = codec.m(m_codes, j) * m_scale;
    v.at[j] = codec.v(v_codes, j) * v_scale;
    adamw_moments(k, grad.at[j] * k.grad_scale, m.at[j], v.at[j]);
  }
}

// The new weights; m_max, v_max: the largest magnitudes, as bits.
template <class W>
G2RPO_DEVICE Eight step_weights(const AdamwConstants& k, float root_factor, const W& weights,
                                const Eight& m, const Eight& v, uint32_t& m_max, uint32_t& v_max) {
  Eight w;
  float m_most = 0, v_most = 0;
  bool exact = true;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    m_most = fmaxf(m_most, fabsf(m.at[j]));
    v_most = fmaxf(v_most, v.at[j]);
    w.at[j] = fast_weight(k, root_factor, weights.fast(j), m.at[j], v.at[j]);
    exact = exact & (fabsf(w.at[j]) >= least_weight);  // && would branch
  }
  m_max = word_of(m_most), v_max = word_of(v_most);
  if (exact) return w;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    m_max = larger(m_max, word_of(m.at[j]) & 0x7FFFFFFF);  // now with NaN above all
    v_max = larger(v_max, word_of(v.at[j]) & 0x7FFFFFFF);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) w.at[j] = adamw_weight(k, weights.exact(j), m.at[j], v.at[j]);
  return w;
}

// ---- A chunk ----

// In shared memory: a parameter from the chunk's first element on, with the count of the chunk.
struct Chunk {
  AdamwTensor t;
  uint64_t counter;  // of Philox
  RoundKeys keys;

  G2RPO_DEVICE void fill(const Adamw8bit& op, int block_shift) {
    const int32_t* which = op.chunks + 2 * static_cast<int64_t>(blockIdx.x);
    const AdamwTensor& whole = op.tensors[which[0]];
    const int64_t begin = which[1] * adamw_chunk;
    const int64_t block = begin >> block_shift, left = whole.count - begin;
    t.param = static_cast<char*>(whole.param) + begin * bytes_of(op.param_dtype);
    t.grad = static_cast<char*>(whole.grad) + begin * bytes_of(op.grad_dtype);
    t.exp_avg = whole.exp_avg + begin;
    t.exp_avg_sq = whole.exp_avg_sq + begin;
    t.exp_avg_scale = whole.exp_avg_scale + block;
    t.exp_avg_sq_scale = whole.exp_avg_sq_scale + block;
    t.low_bits = static_cast<char*>(whole.low_bits) + begin * op.low_bytes;
    t.count = left < adamw_chunk ? left : adamw_chunk;
    counter = static_cast<uint64_t>(whole.first + begin) / 8;
    keys.fill(whole.seed);
  }

  // Whether every 8 elements of every array can be read at once.
  template <int LowBytes>
  G2RPO_DEVICE bool aligned() const {
    const auto word = [](const void* array) { return reinterpret_cast<uintptr_t>(array); };
    uintptr_t by16 = word(t.param) | word(t.grad), by8 = word(t.exp_avg) | word(t.exp_avg_sq);
    if (LowBytes == 1) by8 |= word(t.low_bits);
    if (LowBytes == 2) by16 |= word(t.low_bits);
    return by16 % 16 == 0 && by8 % 8 == 0;
  }
};

// What a thread reads of its 8 elements, and writes.
template <class Codec, Dtype Param, int LowBytes>
struct Held {
  Bits grad;
  Packed<1> m, v;
  Weights<Param, LowBytes> weights;

  template <bool Wide>
  G2RPO_DEVICE void load(const AdamwTensor& t, Dtype grad_dtype, int first, int owned) {
    grad = grad_dtype == Dtype::float32 ? bits_in(load8<4, Wide>(t.grad, first, owned))
                                        : bits_in(load8<2, Wide>(t.grad, first, owned));
    m = load8<1, Wide>(t.exp_avg, first, owned, Codec::zeros);
    v = load8<1, Wide>(t.exp_avg_sq, first, owned);
    weights.high = load8<Weights<Param, LowBytes>::bytes, Wide>(t.param, first, owned);
    weights.low = load8<LowBytes, Wide>(t.low_bits, first, owned);
  }

  template <bool Wide>
  G2RPO_DEVICE void store(const AdamwTensor& t, int first, int owned) const {
    store8<Weights<Param, LowBytes>::bytes, Wide>(t.param, first, owned, weights.high);
    store8<LowBytes, Wide>(t.low_bits, first, owned, weights.low);
    store8<1, Wide>(t.exp_avg, first, owned, m);
    store8<1, Wide>(t.exp_avg_sq, first, owned, v);
  }

  template <bool Wide>
  G2RPO_DEVICE static void zero_grad(const AdamwTensor& t, Dtype grad_dtype, int first, int owned) {
    if (grad_dtype == Dtype::float32) {
      store8<4, Wide>(t.grad, first, owned, {});
    } else {
      store8<2, Wide>(t.grad, first, owned, {});
    }
  }
};

// SameGrad: of the parameter's dtype.
template <class Codec, Dtype Param, int LowBytes, bool SameGrad>
__global__ void __launch_bounds__(adamw_threads, adamw_blocks_at_once)
    adamw8bit_kernel(Adamw8bit op, float root_factor, int block_shift) {
  __shared__ Codec codec;
  __shared__ Chunk chunk;
  __shared__ uint32_t warp_max[2][2][adamw_warps];  // two, so that one barrier a pass is enough

  if (threadIdx.x == 0) chunk.fill(op, block_shift);
  codec.fill();
  __syncthreads();

  const AdamwTensor& t = chunk.t;
  const Dtype grad_dtype = SameGrad ? Param : op.grad_dtype;
  const bool aligned = chunk.aligned<LowBytes>();
  const int count = static_cast<int>(t.count), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // That share a block of moments.
  const int lanes = 1 << block_shift >> 3, warps = lanes > 32 ? lanes / 32 : 1;
  const bool odd = lane % 2 == 1;

  for (int pass = 0; pass < count; pass += pass_elements) {
    const int first = pass + static_cast<int>(threadIdx.x) * thread_elements;
    const int block = first >> block_shift, left = count - first;
    const int owned = left < 0 ? 0 : left < 8 ? left : 8;
    const bool wide = aligned && left >= 8;

    Held<Codec, Param, LowBytes> held;
    if (wide) {
      held.template load<true>(t, grad_dtype, first, owned);
    } else {
      held.template load<false>(t, grad_dtype, first, owned);
    }
    const float m_scale = owned > 0 ? __ldcs(t.exp_avg_scale + block) : 0.0f;
    const float v_scale = owned > 0 ? __ldcs(t.exp_avg_sq_scale + block) : 0.0f;

    Eight m, v;
    uint32_t m_max, v_max;
    step_moments(op.constants, codec, values(held.grad, grad_dtype), held.m, held.v, m_scale,
                 v_scale, m, v);
    const Eight w = step_weights(op.constants, root_factor, held.weights, m, v, m_max, v_max);
    held.weights.set(w, chunk.counter + static_cast<unsigned>(first) / 8, chunk.keys);

    m_max = largest_of_lanes(lanes, m_max), v_max = largest_of_lanes(lanes, v_max);
    if (warps > 1) {
      uint32_t(&of)[2][adamw_warps] = warp_max[pass / pass_elements % 2];
      if (lane == 0) of[0][warp] = m_max, of[1][warp] = v_max;
      __syncthreads();
      for (int i = 0, other = warp & -warps; i < warps; ++i, ++other) {
        m_max = larger(m_max, of[0][other]), v_max = larger(v_max, of[1][other]);
      }
    }

    // Even lanes see to the scale of m, odd ones to that of v.
    const float scale = float_of(static_cast<int32_t>(odd ? v_max : m_max));
    const float inverse = inverse_scale_of(scale);
    const float other = __shfl_xor_sync(0xFFFFFFFFu, inverse, 1);
    held.m = codec.encode_m(m, odd ? other : inverse);
    held.v = codec.encode_v(v, odd ? inverse : other);
    const bool leads = (lane & (lanes - 1)) < 2 && (warp & (warps - 1)) == 0;
    if (leads && left + (odd ? thread_elements : 0) > 0) {
      __stcs((odd ? t.exp_avg_sq_scale : t.exp_avg_scale) + block, scale);
    }
    if (wide) {
      held.template store<true>(t, first, owned);
      if (op.zero_grad) held.template zero_grad<true>(t, grad_dtype, first, owned);
    } else {
      held.template store<false>(t, first, owned);
      if (op.zero_grad) held.template zero_grad<false>(t, grad_dtype, first, owned);
    }
  }
}

}  // namespace g2rpo::cuda
