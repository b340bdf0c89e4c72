// csrc/adamw8bit.cu, run through this folder's cuda_runtime.h, for ctypes.
#include <cuda_runtime.h>

#include "adamw8bit.cu"

using namespace g2rpo;

extern "C" {

const char* emulated_adamw8bit(const Adamw8bit* op, int device) {
  return cuda::adamw8bit(*op, {device, nullptr});
}

// Codes of y in [-1, 1] or [0, 1], a multiple of 8 of them: by the kernel's tables, and by the
// arithmetic of adamw8bit.h.
void emulated_codes(bool with_sign, const float* y, int64_t count, uint8_t* by_table,
                    uint8_t* by_arithmetic) {
  static cuda::DynamicCodec codec;
  codec.tables = cuda::code_tables;
  const DynamicCode code(with_sign);
  for (int64_t i = 0; i < count; i += 8) {
    cuda::Eight eight;
    std::copy(y + i, y + i + 8, eight.at);
    const auto codes = with_sign ? codec.encode_m(eight, 1.0f) : codec.encode_v(eight, 1.0f);
    std::memcpy(by_table + i, codes.word, 8);
    for (int64_t j = i; j < i + 8; ++j) {
      by_arithmetic[j] =
          with_sign ? encode_signed(code, y[j], 1.0f) : encode_unsigned(code, y[j], 1.0f);
    }
  }
}

// New weights by the kernel's few instructions, and by adamw_weight.
void emulated_weights(const AdamwConstants* k, const float* w, const float* m, const float* v,
                      int64_t count, float* fast, float* exact) {
  const float root_factor = cuda::root_factor_of(*k);
  for (int64_t i = 0; i < count; ++i) {
    fast[i] = cuda::fast_weight(*k, root_factor, w[i], m[i], v[i]);
    exact[i] = adamw_weight(*k, w[i], m[i], v[i]);
  }
}

}  // extern "C"
