// What every native op takes and what it does; csrc/*.cpp and csrc/*.cu implement the same list.
//
// Raw pointers to contiguous arrays and sizes; nothing here knows torch or Python, and nothing is
// checked: g2rpo_kernels checks before it calls. P anchor rows, G branches of each, N elements a row
// (G = 1 without a branch axis). A pointer that is not given is null. Outputs may be uninitialised
// memory; every element is written. Sizes of 0 are allowed.
#pragma once

#include <cstdint>

#include "adamw8bit.h"
#include "flow.h"

namespace g2rpo {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A read-only array of floats of one of three types, at any alignment of its elements.
struct Array {
  const void* data;
  Dtype dtype;
};

// The step of P rows: coefficients of row p at table + p * table_stride (stride 0: one row for all).
struct Step {
  Array velocity, latents;  // [P, N]
  const float* table;       // [P, 5] or [1, 5]: a, b, s, w, c
  int64_t table_stride;     // 5 or 0
  int64_t rows, branches, count;
};

struct StepMean {
  Step step;
  float* mean;  // [P, N]
};

struct OdeStep {
  Array velocity, latents;                    // [P, N]
  const float *sigma, *sigma_next;            // [P] or [1]
  int64_t sigma_stride, sigma_next_stride;    // 1 or 0
  int64_t rows, count;
  float* x_next;  // [P, N] = latents + (sigma_next - sigma) * velocity
};

struct Normal {
  const int64_t* seeds;  // [B]
  int64_t seed_count, count;
  float* noise;  // [B, N]
};

struct SdeStep {
  Step step;
  const int64_t* seeds;  // [P, G], or null: noise is given
  Array noise;           // [P, G, N]
  float* x_next;         // [P, G, N]
  float* log_prob;       // [P, G]
  float* scratch;
};

struct BranchLogProb {
  Step step;
  Array x_next;     // [P, G, N]
  float* log_prob;  // [P, G]
  float* scratch;
};

struct PolicyLoss {
  Step step;
  Array x_next;                             // [P, G, N]
  const float *old_log_prob, *advantages;   // [P, G]
  Array reference_velocity, old_velocity;   // [P, N] or null
  LossOptions options;
  float* loss;           // []
  float* log_prob;       // [P, G]
  float* grad_log_prob;  // [P, G], dloss/dlog_prob before the KL term
  float* statistics;     // [5]: ratio mean, ratio max, clip fraction, approx_kl, kl
  float* scratch;
};

struct LogProbBackward {
  Step step;
  Array x_next;                            // [P, G, N]
  const float* grad_log_prob;              // [P, G]
  const float* scale;                      // [] or null
  Array old_velocity, reference_velocity;  // [P, N] or null
  float kl_weight;
  void* grad_velocity;  // [P, N] in velocity's dtype
};

struct GroupAdvantages {
  Array rewards;                                              // [R, J, groups * group_size, K]
  int64_t models, granularities, groups, group_size, positions;
  const double* weights;  // [R] on the host, or null: all 1
  double eps;
  float* advantages;  // [groups * group_size, K]
};

// One parameter of AdamW8bit, flattened: B = ceil(count / block_size) blocks. Ten words of 8 bytes, as
// g2rpo_kernels/optim/pack.py writes them. On a GPU the array of them is in device memory.
struct AdamwTensor {
  void* param;                                // [count] of param_dtype
  void* grad;                                 // [count] of grad_dtype
  uint8_t *exp_avg, *exp_avg_sq;              // [count] codes
  float *exp_avg_scale, *exp_avg_sq_scale;    // [B]
  void* low_bits;                             // [count] of low_bytes
  int64_t count;
  int64_t first;   // index of its first element in the whole parameter, a multiple of 8
  uint64_t seed;
};

constexpr int64_t adamw_chunk = 32768;  // elements; a multiple of every block_size

// One step of parameters of one group and one set of dtypes, in one pass over all of them.
struct Adamw8bit {
  const AdamwTensor* tensors;
  int64_t tensor_count;
  const int32_t* chunks;  // [chunk_count, 2] of a GPU: tensor, and which adamw_chunk of it; or null
  int64_t chunk_count;
  int64_t block_size;             // a power of two, 64 to 1024
  Dtype param_dtype, grad_dtype;  // param: float32 or bfloat16
  int low_bytes;                  // 0, 1 or 2; 0 with float32
  bool dynamic;                   // the code of the moments: Dettmers', or e4m3
  bool zero_grad;                 // leave zeros in grad
  AdamwConstants constants;
};

namespace cpu {

void step_mean(const StepMean&);
void ode_step(const OdeStep&);
void normal(const Normal&);
void sde_step(const SdeStep&);  // scratch is not used on the CPU
void branch_log_prob(const BranchLogProb&);
void policy_loss(const PolicyLoss&);
void log_prob_backward(const LogProbBackward&);
void group_advantages(const GroupAdvantages&);
void adamw8bit(const Adamw8bit&);  // chunks are not used on the CPU

const char* variant();  // the vector variant this machine runs: "avx512", "avx2" or "default"

}  // namespace cpu

namespace cuda {

// Where to launch: a device index, and a cudaStream_t of that device.
struct Stream {
  int device;
  void* handle;
};

// Each returns null, or what CUDA said went wrong. Nothing synchronises; all may be captured.
const char* step_mean(const StepMean&, Stream);
const char* ode_step(const OdeStep&, Stream);
const char* normal(const Normal&, Stream);
const char* sde_step(const SdeStep&, Stream);
const char* branch_log_prob(const BranchLogProb&, Stream);
const char* policy_loss(const PolicyLoss&, Stream);
const char* log_prob_backward(const LogProbBackward&, Stream);
const char* group_advantages(const GroupAdvantages&, Stream);
const char* adamw8bit(const Adamw8bit&, Stream);

// Floats of scratch that sde_step, branch_log_prob and policy_loss need (extras: how many of
// reference_velocity and old_velocity are given).
int64_t scratch_size(int64_t rows, int64_t branches, int64_t count, int64_t extras);

// Runs one empty kernel on the device and waits for it: null, or why kernels cannot run there.
const char* probe(int device);

constexpr int64_t most_models = 64;  // reward models that fit into a launch's parameters

}  // namespace cuda
}  // namespace g2rpo
