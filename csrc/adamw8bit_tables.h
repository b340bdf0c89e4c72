// The dynamic code by table: what a GPU reads instead of comparing with the border of every decade.
//
// The upper 16 bits of a float y (exponent and 7 bits of mantissa) name a bucket, which holds at
// most one border between two codes. A bucket's word is such that
//     (bits of y << 8) + word
// has the code in its highest byte: a border makes the lower bits carry. Made while compiling, from
// DynamicCode and its arithmetic, so the codes are dynamic_index's for every float.
#pragma once

#include "adamw8bit.h"

namespace g2rpo::cuda {

constexpr int bucket_bits = 16;  // of a float that are below its bucket
constexpr uint32_t bits_of_one = 0x3F800000;

// Of 2^-24 <= y < 2; the exponent counts in units of 2^23.
constexpr uint32_t constant_bits(double y) {
  uint32_t bits = bits_of_one;
  for (; y < 1; y *= 2) bits -= 1u << 23;
  return bits + static_cast<uint32_t>((y - 1) * (1 << 23));
}

constexpr float constant_float(uint32_t bits) {
  double y = 1 + static_cast<double>(bits & 0x7FFFFF) / (1 << 23);
  for (uint32_t at = bits; at < bits_of_one; at += 1u << 23) y /= 2;
  return static_cast<float>(y);
}

// Bits of the least y of decade d whose index is q or more.
constexpr uint32_t border_in(const DynamicCode& code, int d, int q) {
  const float slope = code.slope[d + 1], offset = code.offset[d + 1];
  uint32_t bits = constant_bits((static_cast<double>(q) - offset) / slope) - 16;
  for (;; ++bits) {
    const float product = constant_float(bits) * slope;
    const float index = product + offset;
    if (index >= static_cast<float>(q)) return bits;
  }
}

// Plain arrays: a kernel keeps them in shared memory, where nothing is constructed.
template <bool Signed>
struct CodeTable {
  static constexpr int first_step = Signed ? 1 : 2;        // index of the first value above 0
  static constexpr int last_step = first_step << decades;  // index of 1
  static constexpr uint32_t least = Signed ? 0x34800000 : 0x34000000;  // 2^-22, 2^-23: coded as 0
  static constexpr int first_bucket = least >> bucket_bits;
  static constexpr int size = (bits_of_one >> bucket_bits) - first_bucket + 1;

  uint32_t word[size];

  // The byte is the index q if Signed, else the code, q - 1.
  constexpr void fill() {
    const DynamicCode code(Signed);
    int q = first_step, decade = 0;
    uint32_t border = constant_bits(code.from[0]);
    for (int i = 0; i < size; ++i) {
      const uint32_t bucket = static_cast<uint32_t>(first_bucket + i);
      const uint32_t start = bucket << bucket_bits;
      while (q <= last_step && border <= start) border = border_of(code, ++q, decade);
      word[i] = (static_cast<uint32_t>(Signed ? q - 1 : q - 2) - bucket) << 24;
      if (q <= last_step && border - start < 1u << bucket_bits) {
        word[i] += (1u << 24) - ((border - start) << 8);
      }
    }
  }

 private:
  // decade: that of index q - 1, and then that of q.
  static constexpr uint32_t border_of(const DynamicCode& code, int q, int& decade) {
    if (q > last_step) return 0;  // there is none
    if (q < first_step << (decade + 1)) return border_in(code, decade, q);
    return constant_bits(code.from[++decade]);
  }
};

struct alignas(16) CodeTables {
  float signed_value[256], unsigned_value[256];  // by code
  CodeTable<true> signed_code;
  CodeTable<false> unsigned_code;
};

constexpr CodeTables make_code_tables() {
  CodeTables tables = {};
  const DynamicCode with_sign(true), without(false);
  for (int i = 0; i < 256; ++i) {
    tables.signed_value[i] = with_sign.value[i];
    tables.unsigned_value[i] = without.value[i];
  }
  tables.signed_code.fill();
  tables.unsigned_code.fill();
  return tables;
}

}  // namespace g2rpo::cuda
