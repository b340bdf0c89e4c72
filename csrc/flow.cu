// The CUDA backend of the flow-RL ops: namespace g2rpo::cuda of ops.h.
//
// Kernels: step_kernels.cuh, loss_kernels.cuh.
#include <cuda_runtime.h>

#include <initializer_list>

#include "launch.cuh"
#include "loss_kernels.cuh"

namespace g2rpo::cuda {
namespace {

// Whether every row starts at a 16-byte boundary. Null pointers are aligned.
bool aligned(int64_t count, std::initializer_list<const void*> arrays) {
  bool all = count % thread_elements == 0;
  for (const void* array : arrays) all = all && reinterpret_cast<uintptr_t>(array) % 16 == 0;
  return all;
}

// Scratch: partial sums [P, slots, chunks], loss sums [loss_sums, finish_threads], a counter.
struct Scratch {
  float *partial, *sums;
  uint32_t* counter;
};

int64_t partial_size(int64_t rows, int64_t branches, int64_t count, int64_t extras) {
  return partial_at(rows, branches + extras, 0, chunks_of(count));
}

Scratch scratch_of(float* scratch, const Step& step, int64_t extras) {
  float* sums = scratch + partial_size(step.rows, step.branches, step.count, extras);
  return {scratch, sums, reinterpret_cast<uint32_t*>(sums + loss_sums * finish_threads)};
}

cudaError_t finish_log_prob(const Step& step, const float* partial, float* log_prob,
                            Stream stream) {
  const int64_t blocks = divide_up(step.rows * step.branches, finish_warps);
  return launch(finish_log_prob_kernel, blocks, finish_threads, stream, step,
                chunks_of(step.count), partial, log_prob);
}

template <class Noise>
const char* sde_step_from(const SdeStep& op, const Noise& noise, Stream stream) {
  const Step& step = op.step;
  const bool is_aligned = aligned(
      step.count, {step.velocity.data, step.latents.data, op.noise.data, op.x_next});
  return on_device(stream, [&] {
    const Tiling tiling = tiling_of(step.rows, step.branches, step.count, Noise::in_flight);
    const auto kernel = is_aligned ? sde_step_kernel<true, Noise> : sde_step_kernel<false, Noise>;
    const cudaError_t error =
        launch(kernel, tiling.blocks, block_threads, stream, step, noise, tiling, op.scratch);
    if (error != cudaSuccess) return error;
    return finish_log_prob(step, op.scratch, op.log_prob, stream);
  });
}

cudaError_t launch_squares(const Step& step, Array x_next, const Others& others, float* partial,
                           uint32_t* counter, Stream stream) {
  const bool is_aligned =
      aligned(step.count, {step.velocity.data, step.latents.data, x_next.data,
                           others.reference.data, others.old.data});
  const Tiling tiling =
      tiling_of(step.rows, step.branches, step.count, StoredNext::in_flight);
  const auto kernel = is_aligned ? branch_squares_kernel<true> : branch_squares_kernel<false>;
  return launch(kernel, tiling.blocks, block_threads, stream, step, StoredNext{x_next}, others,
                tiling, partial, counter);
}

__global__ void probe_kernel() {}

}  // namespace

const char* step_mean(const StepMean& op, Stream stream) {
  const Step& step = op.step;
  if (step.rows * step.count == 0) return nullptr;
  const bool is_aligned = aligned(step.count, {step.velocity.data, step.latents.data, op.mean});
  const Tiling tiling = tiling_of(step.rows, 1, step.count, 1);
  return on_device(stream, [&] {
    const auto kernel = is_aligned ? step_mean_kernel<true> : step_mean_kernel<false>;
    return launch(kernel, tiling.blocks, block_threads, stream, op, tiling);
  });
}

const char* ode_step(const OdeStep& op, Stream stream) {
  if (op.rows * op.count == 0) return nullptr;
  const bool is_aligned = aligned(op.count, {op.velocity.data, op.latents.data, op.x_next});
  const Tiling tiling = tiling_of(op.rows, 1, op.count, 1);
  return on_device(stream, [&] {
    const auto kernel = is_aligned ? ode_step_kernel<true> : ode_step_kernel<false>;
    return launch(kernel, tiling.blocks, block_threads, stream, op, tiling);
  });
}

const char* normal(const Normal& op, Stream stream) {
  if (op.seed_count * op.count == 0) return nullptr;
  const Tiling tiling = tiling_of(op.seed_count, 1, op.count, 1);
  return on_device(stream, [&] {
    const auto kernel = aligned(op.count, {op.noise}) ? normal_kernel<true> : normal_kernel<false>;
    return launch(kernel, tiling.blocks, block_threads, stream, op, tiling);
  });
}

const char* sde_step(const SdeStep& op, Stream stream) {
  if (op.step.rows * op.step.branches == 0) return nullptr;
  if (op.seeds != nullptr) return sde_step_from(op, DrawnNoise{op.seeds, op.x_next}, stream);
  return sde_step_from(op, GivenNoise{op.noise, op.x_next}, stream);
}

const char* branch_log_prob(const BranchLogProb& op, Stream stream) {
  if (op.step.rows * op.step.branches == 0) return nullptr;
  return on_device(stream, [&] {
    const cudaError_t error =
        launch_squares(op.step, op.x_next, Others{}, op.scratch, nullptr, stream);
    if (error != cudaSuccess) return error;
    return finish_log_prob(op.step, op.scratch, op.log_prob, stream);
  });
}

const char* policy_loss(const PolicyLoss& op, Stream stream) {
  const int64_t branches = op.step.rows * op.step.branches;
  if (branches == 0) return nullptr;  // a mean over nothing, refused before
  const Others others = {op.reference_velocity, op.old_velocity};
  const Scratch scratch = scratch_of(op.scratch, op.step, count_of(others));
  return on_device(stream, [&] {
    const cudaError_t error =
        launch_squares(op.step, op.x_next, others, scratch.partial, scratch.counter, stream);
    if (error != cudaSuccess) return error;
    return launch(finish_policy_loss_kernel, finish_blocks(branches), finish_threads, stream, op,
                  chunks_of(op.step.count), scratch.partial, scratch.sums, scratch.counter);
  });
}

const char* log_prob_backward(const LogProbBackward& op, Stream stream) {
  const Step& step = op.step;
  if (step.rows * step.count == 0) return nullptr;
  const bool is_aligned =
      aligned(step.count, {step.velocity.data, step.latents.data, op.x_next.data,
                           op.old_velocity.data, op.reference_velocity.data, op.grad_velocity});
  const Tiling tiling = tiling_of(step.rows, 1, step.count, 1);
  return on_device(stream, [&] {
    const auto kernel =
        is_aligned ? log_prob_backward_kernel<true> : log_prob_backward_kernel<false>;
    return launch(kernel, tiling.blocks, block_threads, stream, op, tiling);
  });
}

const char* group_advantages(const GroupAdvantages& op, Stream stream) {
  const int64_t size = op.groups * op.group_size * op.positions;
  if (size == 0) return nullptr;
  if (op.models > most_models) return "more reward models than fit into a launch's parameters";
  Weights weights = {};
  for (int64_t r = 0; r < op.models; ++r) {
    weights.of_model[r] = op.weights != nullptr ? op.weights[r] : 1.0;
  }
  return on_device(stream, [&] {
    auto kernel = group_advantages_kernel<Dtype::float32>;
    if (op.rewards.dtype == Dtype::bfloat16) kernel = group_advantages_kernel<Dtype::bfloat16>;
    if (op.rewards.dtype == Dtype::float16) kernel = group_advantages_kernel<Dtype::float16>;
    return launch(kernel, divide_up(size, block_threads), block_threads, stream, op, weights);
  });
}

int64_t scratch_size(int64_t rows, int64_t branches, int64_t count, int64_t extras) {
  return partial_size(rows, branches, count, extras) + loss_sums * finish_threads + 1;
}

const char* probe(int device) {
  return on_device({device, nullptr}, [&] {
    // Relaxed: another thread of the process may be capturing a graph right now.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) return error;
    cudaStream_t stream = nullptr;
    error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) {
      error = launch(probe_kernel, 1, 1, {device, stream});
      if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
      cudaStreamDestroy(stream);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
  });
}

}  // namespace g2rpo::cuda
