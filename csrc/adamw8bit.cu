// The CUDA backend of AdamW8bit: cuda::adamw8bit of ops.h.
#include <cmath>

#include "adamw8bit_kernel.cuh"
#include "launch.cuh"

namespace g2rpo::cuda {
namespace {

using Kernel = void (*)(Adamw8bit, float, int);

template <class Codec, bool SameGrad>
Kernel kernel_of(const Adamw8bit& op) {
  if (op.param_dtype == Dtype::float32) return adamw8bit_kernel<Codec, Dtype::float32, 0, SameGrad>;
  if (op.low_bytes == 0) return adamw8bit_kernel<Codec, Dtype::bfloat16, 0, SameGrad>;
  if (op.low_bytes == 1) return adamw8bit_kernel<Codec, Dtype::bfloat16, 1, SameGrad>;
  return adamw8bit_kernel<Codec, Dtype::bfloat16, 2, SameGrad>;
}

template <class Codec>
Kernel kernel_with(const Adamw8bit& op) {
  return op.grad_dtype == op.param_dtype ? kernel_of<Codec, true>(op) : kernel_of<Codec, false>(op);
}

// Roots below 2^-70 must not change eps, nor eps be so small that a quotient becomes large.
float root_factor_of(const AdamwConstants& k) {
  const bool fits = k.eps >= 0x1p-40f && k.eps <= 1.0f && k.inv_sqrt_bias2 <= k.eps * 0x1p44f;
  return fits ? k.inv_sqrt_bias2 * 0x1p-32f : NAN;
}

}  // namespace

const char* adamw8bit(const Adamw8bit& op, Stream stream) {
  if (op.chunk_count == 0) return nullptr;
  int block_shift = 0;
  while (int64_t{1} << block_shift < op.block_size) ++block_shift;
  return on_device(stream, [&] {
    const Kernel kernel = op.dynamic ? kernel_with<DynamicCodec>(op) : kernel_with<E4m3Codec>(op);
    return launch(kernel, op.chunk_count, adamw_threads, stream, op, root_factor_of(op.constants),
                  block_shift);
  });
}

}  // namespace g2rpo::cuda
