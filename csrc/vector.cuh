// Eight consecutive elements of a thread: 16-byte loads and stores where a row allows them, guarded
// scalar ones elsewhere, and the conversion of the three dtypes to float32 and back.
//
// Loads are kept apart from conversions: a thread fetches the bits of all it needs first and
// converts afterwards, so that many loads are in flight whatever the dtypes, which are known at run
// time only (the branches on them are uniform).
#pragma once

#include <cuda_runtime.h>

#include "index.h"
#include "ops.h"

#define G2RPO_DEVICE __device__ __forceinline__

namespace g2rpo::cuda {

// As loaded: 8 words of float32, or 4 words of two halves each, the first in the low bits.
struct Bits {
  uint32_t word[8];
};

struct Eight {
  float at[8];
};

G2RPO_DEVICE int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Elements first..first+7 of `array` [..., N], of which a row has `owned`; the others read as 0.
// Aligned: `owned` is 0 or 8, and array.data + first is 16-byte aligned.
template <bool Aligned>
G2RPO_DEVICE Bits fetch(Array array, int64_t first, int owned) {
  Bits bits = {};
  const char* from = static_cast<const char*>(array.data) + first * bytes_of(array.dtype);
  if constexpr (Aligned) {
    const uint4* vectors = reinterpret_cast<const uint4*>(from);
    if (owned > 0) {
      const uint4 low = __ldg(vectors);
      bits.word[0] = low.x, bits.word[1] = low.y, bits.word[2] = low.z, bits.word[3] = low.w;
    }
    if (owned > 0 && array.dtype == Dtype::float32) {
      const uint4 high = __ldg(vectors + 1);
      bits.word[4] = high.x, bits.word[5] = high.y, bits.word[6] = high.z, bits.word[7] = high.w;
    }
  } else if (array.dtype == Dtype::float32) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < owned) bits.word[j] = __ldg(words + j);
    }
  } else {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < owned) bits.word[j / 2] |= static_cast<uint32_t>(__ldg(halves + j)) << (16 * (j % 2));
    }
  }
  return bits;
}

// float_of_f16 in one instruction.
G2RPO_DEVICE float half_to_float(uint16_t h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  return float_of_f16(h);
#endif
}

G2RPO_DEVICE Eight values(const Bits& bits, Dtype dtype) {
  Eight out;
  if (dtype == Dtype::float32) {
#pragma unroll
    for (int j = 0; j < 8; ++j) out.at[j] = float_of(static_cast<int32_t>(bits.word[j]));
  } else if (dtype == Dtype::bfloat16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out.at[j] = float_of_bf16(static_cast<uint16_t>(bits.word[j / 2] >> (16 * (j % 2))));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out.at[j] = half_to_float(static_cast<uint16_t>(bits.word[j / 2] >> (16 * (j % 2))));
    }
  }
  return out;
}

// One 16-byte store. Spelt out, because nvcc takes some assignments of a uint4 apart.
G2RPO_DEVICE void store16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
#else
  *static_cast<uint4*>(to) = make_uint4(a, b, c, d);
#endif
}

G2RPO_DEVICE uint32_t word_of(float x) { return static_cast<uint32_t>(bits_of(x)); }

template <bool Aligned>
G2RPO_DEVICE void store(float* out, int64_t first, int owned, const Eight& x) {
  if constexpr (Aligned) {
    if (owned == 0) return;
#pragma unroll
    for (int j = 0; j < 8; j += 4) {
      store16(out + first + j, word_of(x.at[j]), word_of(x.at[j + 1]), word_of(x.at[j + 2]),
              word_of(x.at[j + 3]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < owned) out[first + j] = x.at[j];
    }
  }
}

G2RPO_DEVICE uint16_t half_of(float x, Dtype dtype) {
  return dtype == Dtype::bfloat16 ? bf16_of(x) : f16_of(x);
}

// The same, rounded to `dtype`.
template <bool Aligned>
G2RPO_DEVICE void store_as(void* out, Dtype dtype, int64_t first, int owned, const Eight& x) {
  if (dtype == Dtype::float32) {
    store<Aligned>(static_cast<float*>(out), first, owned, x);
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(out) + first;
  if constexpr (Aligned) {
    if (owned == 0) return;
    uint32_t word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      word[j] = half_of(x.at[2 * j], dtype) |
                static_cast<uint32_t>(half_of(x.at[2 * j + 1], dtype)) << 16;
    }
    store16(halves, word[0], word[1], word[2], word[3]);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (j < owned) halves[j] = half_of(x.at[j], dtype);
    }
  }
}

// ---- What the step kernels start from ----

G2RPO_DEVICE Eight mean_of(Coefficients k, const Eight& latents, const Eight& velocity) {
  Eight mean;
#pragma unroll
  for (int j = 0; j < 8; ++j) mean.at[j] = step_mean(k, latents.at[j], velocity.at[j]);
  return mean;
}

// Elements first..first+7 of the noise of one seed; first is a multiple of 8.
G2RPO_DEVICE Eight normal8(int64_t first, uint64_t seed) {
  Eight noise;
  normal4(static_cast<uint64_t>(first) / 4, seed, noise.at);
  normal4(static_cast<uint64_t>(first) / 4 + 1, seed, noise.at + 4);
  return noise;
}

}  // namespace g2rpo::cuda
