// What AdamW8bit's kernel is made of: 8 elements of an array, and the codes of 8 moments, in as few
// instructions as give the bits of adamw8bit.h.
#pragma once

#include <type_traits>

#include "adamw8bit_tables.h"
#include "vector.cuh"

namespace g2rpo::cuda {

// ---- Instructions ----

// Off by up to one unit in the last place, here as there.
G2RPO_DEVICE float approximate_reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return float_of(bits_of(1.0f / x) + bits_of(x) % 3 - 1);
#endif
}

G2RPO_DEVICE float approximate_rsqrt(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  // As good as the hardware's must be: one off by an ulp makes 2 or 3 of all 2^24 roots wrong.
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
#endif
}

G2RPO_DEVICE uint32_t larger(uint32_t x, uint32_t y) { return x > y ? x : y; }

// The largest x of the lanes of a warp that share a block: a power of two of them, or all.
G2RPO_DEVICE uint32_t largest_of_lanes(int lanes, uint32_t x) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if (lanes >= 32) return __reduce_max_sync(0xFFFFFFFFu, x);
#endif
  for (int distance = lanes < 32 ? lanes / 2 : 16; distance > 0; distance /= 2) {
    x = larger(x, __shfl_xor_sync(0xFFFFFFFFu, x, distance));
  }
  return x;
}

// Four of the bytes of a (0-3) and b (4-7), by the nibbles of `selector`, lowest first; with 8
// added, the byte's sign in all its bits.
G2RPO_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
#else
  const uint64_t from = static_cast<uint64_t>(b) << 32 | a;
  uint32_t bytes = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i) & 15, byte = from >> (8 * (nibble & 7)) & 0xFF;
    bytes |= (nibble & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << (8 * i);
  }
  return bytes;
#endif
}

// Byte `byte` of each of four words.
G2RPO_DEVICE uint32_t gather(int byte, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t two = static_cast<uint32_t>(byte | (byte + 4) << 4);
  return permute(permute(a, b, two), permute(c, d, two), 0x5410);
}

// 0xFF in the bytes of those of four floats that are negative.
G2RPO_DEVICE uint32_t gather_signs(float a, float b, float c, float d) {
  return permute(permute(word_of(a), word_of(b), 0xFB), permute(word_of(c), word_of(d), 0xFB),
                 0x5410);
}

// ---- 8 elements of 1, 2 or 4 bytes each ----

// Of 0 bytes: not there, and neither read nor written.
template <int Bytes>
struct Packed {
  uint32_t word[Bytes > 0 ? 2 * Bytes : 1] = {};
};

template <int Bytes>
using Element = std::conditional_t<Bytes == 1, uint8_t,
                                   std::conditional_t<Bytes == 2, uint16_t, uint32_t>>;

// Elements first..first+7 of `array`. Wide: all are there, and aligned. Else the first `owned`, one
// by one; the others are those of the word `missing`.
template <int Bytes, bool Wide>
G2RPO_DEVICE Packed<Bytes> load8(const void* array, int first, int owned, uint32_t missing = 0) {
  Packed<Bytes> out;
  const char* from = static_cast<const char*>(array) + static_cast<unsigned>(first) * size_t{Bytes};
  if constexpr (Bytes > 0 && !Wide) {
#pragma unroll
    for (int i = 0; i < 2 * Bytes; ++i) {
      const Element<Bytes>* elements = reinterpret_cast<const Element<Bytes>*>(from + 4 * i);
      out.word[i] = missing;
#pragma unroll 1
      for (int j = 0; j < 4 / Bytes && i * 4 / Bytes + j < owned; ++j) {
        const Element<Bytes> element = __ldcs(elements + j) ^ static_cast<Element<Bytes>>(missing);
        out.word[i] ^= static_cast<uint32_t>(element) << (8 * Bytes * j);
      }
    }
  } else if constexpr (Bytes == 1) {
    const uint2 two = __ldcs(reinterpret_cast<const uint2*>(from));
    out.word[0] = two.x, out.word[1] = two.y;
  } else if constexpr (Bytes > 1) {
#pragma unroll
    for (int i = 0; i < 2 * Bytes; i += 4) {
      const uint4 four = __ldcs(reinterpret_cast<const uint4*>(from) + i / 4);
      out.word[i] = four.x, out.word[i + 1] = four.y;
      out.word[i + 2] = four.z, out.word[i + 3] = four.w;
    }
  }
  return out;
}

template <int Bytes, bool Wide>
G2RPO_DEVICE void store8(void* array, int first, int owned, const Packed<Bytes>& in) {
  char* to = static_cast<char*>(array) + static_cast<unsigned>(first) * size_t{Bytes};
  if constexpr (Bytes > 0 && !Wide) {
#pragma unroll
    for (int i = 0; i < 2 * Bytes; ++i) {
      Element<Bytes>* elements = reinterpret_cast<Element<Bytes>*>(to + 4 * i);
#pragma unroll 1
      for (int j = 0; j < 4 / Bytes && i * 4 / Bytes + j < owned; ++j) {
        __stcs(elements + j, static_cast<Element<Bytes>>(in.word[i] >> (8 * Bytes * j)));
      }
    }
  } else if constexpr (Bytes == 1) {
    __stcs(reinterpret_cast<uint2*>(to), make_uint2(in.word[0], in.word[1]));
  } else if constexpr (Bytes > 1) {
#pragma unroll
    for (int i = 0; i < 2 * Bytes; i += 4) {
      __stcs(reinterpret_cast<uint4*>(to) + i / 4,
             make_uint4(in.word[i], in.word[i + 1], in.word[i + 2], in.word[i + 3]));
    }
  }
}

template <int Bytes>
G2RPO_DEVICE Bits bits_in(const Packed<Bytes>& in) {
  Bits bits = {};
#pragma unroll
  for (int i = 0; i < 2 * Bytes; ++i) bits.word[i] = in.word[i];
  return bits;
}

// ---- Codes of the moments: tables in shared memory ----

__device__ constexpr CodeTables code_tables = make_code_tables();

// table[code j of 4]: a dot product with 4 at byte j is the entry's offset in bytes.
G2RPO_DEVICE float decode(const float* table, const Packed<1>& codes, int j) {
  const uint32_t offset = __dp4a(codes.word[j / 4], 4u << (8 * (j % 4)), 0u);
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + offset);
}

struct DynamicCodec {
  static constexpr uint32_t zeros = 0x7F7F7F7F;  // four codes of m = 0

  CodeTables tables;

  G2RPO_DEVICE void fill() {
    const uint4* in = reinterpret_cast<const uint4*>(&code_tables);
    uint4* out = reinterpret_cast<uint4*>(&tables);
    for (unsigned i = threadIdx.x; i < sizeof(CodeTables) / 16; i += blockDim.x) out[i] = in[i];
  }

  G2RPO_DEVICE float m(const Packed<1>& codes, int j) const {
    return decode(tables.signed_value, codes, j);
  }
  G2RPO_DEVICE float v(const Packed<1>& codes, int j) const {
    return decode(tables.unsigned_value, codes, j);
  }

  // The word whose highest byte is the code of y.
  template <bool Signed>
  G2RPO_DEVICE static uint32_t look_up(const CodeTable<Signed>& table, float y) {
    const uint32_t bits = word_of(fmaxf(fabsf(y), float_of(CodeTable<Signed>::least)));
    // 4 times its upper half, less the first entry's
    const int32_t offset = static_cast<int32_t>(__dp2a_hi(bits, 0x04000000u, 0u)) -
                           4 * CodeTable<Signed>::first_bucket;
    const char* entry = reinterpret_cast<const char*>(table.word) + offset;
    return (bits << 8) + *reinterpret_cast<const uint32_t*>(entry);
  }

  G2RPO_DEVICE Packed<1> encode_m(const Eight& x, float inverse) const {
    Packed<1> codes;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float y[4];
      uint32_t at[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        y[j] = x.at[i + j] * inverse;
        at[j] = look_up(tables.signed_code, y[j]);
      }
      // 127 + q, or 127 - min(q, 127), in each byte; none of the four overflows in the end.
      const uint32_t q = gather(3, at[0], at[1], at[2], at[3]);
      const uint32_t negative = q & gather_signs(y[0], y[1], y[2], y[3]);
      codes.word[i / 4] =
          q + 0x7F7F7F7Fu - negative - negative + ((negative & 0x80808080u) >> 7);
    }
    return codes;
  }

  G2RPO_DEVICE Packed<1> encode_v(const Eight& x, float inverse) const {
    Packed<1> codes;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      uint32_t at[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) at[j] = look_up(tables.unsigned_code, x.at[i + j] * inverse);
      codes.word[i / 4] = gather(3, at[0], at[1], at[2], at[3]);
    }
    return codes;
  }
};

struct E4m3Codec {
  static constexpr uint32_t zeros = 0;

  float value[256];

  G2RPO_DEVICE void fill() {
    for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) {
      value[i] = decode_e4m3(static_cast<uint8_t>(i));
    }
  }

  G2RPO_DEVICE float m(const Packed<1>& codes, int j) const { return decode(value, codes, j); }
  G2RPO_DEVICE float v(const Packed<1>& codes, int j) const { return decode(value, codes, j); }

  G2RPO_DEVICE static Packed<1> encode_m(const Eight& x, float inverse) {
    Packed<1> codes;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      codes.word[j / 4] |= static_cast<uint32_t>(encode_e4m3(x.at[j], inverse)) << (8 * (j % 4));
    }
    return codes;
  }
  G2RPO_DEVICE static Packed<1> encode_v(const Eight& x, float inverse) {
    return encode_m(x, inverse);
  }
};

}  // namespace g2rpo::cuda
