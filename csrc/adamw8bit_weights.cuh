// The weights of a thread of AdamW8bit's kernel: 8 masters from their parts and back, rounded at
// random.
#pragma once

#include "adamw8bit_parts.cuh"

namespace g2rpo::cuda {

// ---- Random bits ----

// Philox's keys of ten rounds, of a seed; two rounds in each.
struct RoundKeys {
  uint4 of[5];

  G2RPO_DEVICE void fill(uint64_t seed) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (uint4& two : of) {
      two = make_uint4(k0, k1, k0 + 0x9E3779B9, k1 + 0xBB67AE85);
      k0 += 2 * 0x9E3779B9, k1 += 2 * 0xBB67AE85;
    }
  }
};

// philox(), but with both halves of a product from one multiplication.
G2RPO_DEVICE Words philox_words(uint64_t counter, const RoundKeys& keys) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  const auto round = [&](uint32_t k0, uint32_t k1) {
    const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t second = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(second), c3 = static_cast<uint32_t>(first);
  };
#pragma unroll
  for (int i = 0; i < 5; ++i) {
    const uint4 two = keys.of[i];
    round(two.x, two.y);
    round(two.z, two.w);
  }
  return {c0, c1, c2, c3};
}

// ---- The weights of a thread ----

template <Dtype Param, int LowBytes>
struct Weights {
  static constexpr int bytes = Param == Dtype::float32 ? 4 : 2;
  Packed<bytes> high;
  Packed<LowBytes> low;

  // low << 8, or low
  G2RPO_DEVICE uint32_t low_of(int j) const {
    if constexpr (LowBytes == 0) {
      return 0;
    } else if constexpr (LowBytes == 1) {
      const uint32_t byte = j % 4;
      return permute(low.word[j / 4], 0, (8 | byte) * 0x1100 | byte << 4 | 4);
    } else {
      return permute(low.word[j / 2], 0, j % 2 ? 0xBB32 : 0x9910);
    }
  }

  // join_master, but NaN where a weight of 0 has bits below it.
  G2RPO_DEVICE float fast(int j) const {
    if constexpr (Param == Dtype::float32) return float_of(static_cast<int32_t>(high.word[j]));
    const uint32_t pair = high.word[j / 2];
    return float_of(static_cast<int32_t>((j % 2 ? pair & 0xFFFF0000u : pair << 16) + low_of(j)));
  }

  G2RPO_DEVICE float exact(int j) const {
    if constexpr (Param == Dtype::float32) return fast(j);
    const int32_t below = static_cast<int32_t>(low_of(j));
    return join_master(static_cast<uint16_t>(high.word[j / 2] >> (16 * (j % 2))),
                       LowBytes == 1 ? below >> 8 : below, 8 * LowBytes);
  }

  // bits and the random ones of element j that are to be cut off
  G2RPO_DEVICE static uint32_t add_random(uint32_t bits, const Words& random, int j) {
    const uint32_t pair = j < 4 ? (j < 2 ? random.w0 : random.w1) : (j < 6 ? random.w2 : random.w3);
    if constexpr (LowBytes == 1) return __dp4a(pair, j % 2 ? 1u << 24 : 1u << 8, bits);
    return bits + (j % 2 ? pair >> 16 : pair & 0xFFFF);
  }

  // round_master and split_master: once the random bits are added, the low bits lie right above
  // what is cut off, and adding half of a bfloat16 leaves the nearest one on top.
  // counter: of Philox
  G2RPO_DEVICE void set(const Eight& w, uint64_t counter, const RoundKeys& keys) {
    if constexpr (Param == Dtype::float32) {
#pragma unroll
      for (int j = 0; j < 8; ++j) high.word[j] = word_of(w.at[j]);
    } else {
      Words random = {};
      if constexpr (LowBytes < 2) random = philox_words(counter, keys);
      uint32_t bits[8], nearest[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        bits[j] = word_of(w.at[j]);
        if constexpr (LowBytes < 2) bits[j] = add_random(bits[j], random, j);
        nearest[j] = bits[j] + (LowBytes > 0 ? 0x8000 : 0);
      }
#pragma unroll
      for (int j = 0; j < 8; j += 2) high.word[j / 2] = permute(nearest[j], nearest[j + 1], 0x7632);
#pragma unroll
      for (int i = 0; i < 2 * LowBytes; ++i) {
        const uint32_t* of = bits + (LowBytes == 1 ? 4 : 2) * i;
        low.word[i] = LowBytes == 1 ? gather(1, of[0], of[1], of[2], of[3])
                                    : permute(of[0], of[1], 0x5410);
      }
    }
  }
};

}  // namespace g2rpo::cuda
