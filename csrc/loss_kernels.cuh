// Kernels of the policy loss: what follows its squares, its gradient, and the advantages it takes.
#pragma once

#include "step_kernels.cuh"

namespace g2rpo::cuda {

// ---- Loss and statistics ----

// Sums over branches of what the statistics are made of; one is a maximum.
enum LossSum { sum_loss, sum_ratio, max_ratio, sum_outside, sum_approx_kl, sum_kl };

struct LossSums {
  float at[loss_sums];
};

G2RPO_DEVICE LossSums no_branches() { return {{0.0f, 0.0f, -INFINITY, 0.0f, 0.0f, 0.0f}}; }

G2RPO_DEVICE void combine(LossSums& x, const LossSums& y) {
#pragma unroll
  for (int i = 0; i < loss_sums; ++i) {
    x.at[i] = i == max_ratio ? max_or_nan(x.at[i], y.at[i]) : x.at[i] + y.at[i];
  }
}

// Of what each warp has in its lane 0, in the order of the warps; valid in thread 0.
G2RPO_DEVICE LossSums combine_over_block(const LossSums& x) {
  __shared__ LossSums of_warp[finish_warps];
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  LossSums total = of_warp[0];
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < finish_warps; ++warp) combine(total, of_warp[warp]);
  }
  __syncthreads();
  return total;
}

// A warp a branch: log_prob and its gradient from partial [P, G + extras, chunks]. The block that
// finishes last adds up what each of them left in sums [loss_sums, finish_threads], in their order.
__global__ void __launch_bounds__(finish_threads)
    finish_policy_loss_kernel(PolicyLoss op, int64_t chunks, const float* partial, float* sums,
                              uint32_t* counter) {
  const Step& step = op.step;
  const bool has_reference = op.reference_velocity.data != nullptr;
  const bool has_old = op.old_velocity.data != nullptr;
  const int extras = has_reference + has_old;
  const int64_t branches = step.rows * step.branches;

  LossSums own = no_branches();
  for (int64_t branch = static_cast<int64_t>(blockIdx.x) * finish_warps + threadIdx.x / 32;
       branch < branches; branch += static_cast<int64_t>(gridDim.x) * finish_warps) {
    const int64_t row = branch / step.branches, g = branch - row * step.branches;
    const float* slots = partial + partial_at(row, step.branches + extras, 0, chunks);
    const float* reference = slots + step.branches * chunks;
    const float* old = has_reference ? reference + chunks : reference;
    const Coefficients k = coefficients_of(step.table, step.table_stride, row);
    const float log_prob = log_prob_of(k, sum_chunks(slots + g * chunks, chunks), step.count);
    float log_ratio = log_prob - op.old_log_prob[branch], slope = 1.0f, kl = 0.0f;
    if (has_old) {
      log_ratio = (log_ratio + mean_gap_of(k, sum_chunks(old, chunks), step.count)) * k.s;
      slope = k.s;
    }
    if (has_reference && g == 0) kl = mean_gap_of(k, sum_chunks(reference, chunks), step.count);
    const BranchLoss b = branch_loss(log_ratio, op.advantages[branch], slope, op.options);
    if (threadIdx.x % 32 == 0) {
      op.log_prob[branch] = log_prob;
      op.grad_log_prob[branch] = b.grad_log_prob / static_cast<float>(branches);
    }
    const float approx_kl = b.ratio - 1.0f - b.log_ratio;
    combine(own, {{b.loss, b.ratio, b.ratio, b.outside, approx_kl, kl}});
  }

  __shared__ bool is_last;
  const LossSums of_block = combine_over_block(own);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < loss_sums; ++i) sums[i * finish_threads + blockIdx.x] = of_block.at[i];
    __threadfence();  // written before it is counted
    is_last = atomicAdd(counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();

  LossSums all = no_branches();
  if (threadIdx.x < gridDim.x) {
#pragma unroll
    for (int i = 0; i < loss_sums; ++i) all.at[i] = __ldcg(sums + i * finish_threads + threadIdx.x);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    LossSums other;
#pragma unroll
    for (int i = 0; i < loss_sums; ++i) {
      other.at[i] = __shfl_xor_sync(0xFFFFFFFFu, all.at[i], distance);
    }
    combine(all, other);
  }
  all = combine_over_block(all);
  if (threadIdx.x == 0) {
    const float count = static_cast<float>(branches);
    const float kl = all.at[sum_kl] / static_cast<float>(step.rows);
    const float loss = all.at[sum_loss] / count;
    *op.loss = has_reference ? loss + op.options.kl_weight * kl : loss;
    op.statistics[0] = all.at[sum_ratio] / count;
    op.statistics[1] = all.at[max_ratio];
    op.statistics[2] = all.at[sum_outside] / count;
    op.statistics[3] = all.at[sum_approx_kl] / count;
    op.statistics[4] = kl;
  }
}

// ---- Gradient ----

// total += factor * (velocity - other), where other is given.
template <bool Aligned>
G2RPO_DEVICE void add_drift(Eight& total, float factor, Array velocity, Array other, int64_t first,
                            int owned) {
  if (other.data == nullptr) return;
  const Bits v = fetch<Aligned>(velocity, first, owned);  // again: cheaper than to keep it
  const Bits o = fetch<Aligned>(other, first, owned);
  const Eight x = values(v, velocity.dtype), y = values(o, other.dtype);
#pragma unroll
  for (int j = 0; j < 8; ++j) total.at[j] += factor * (x.at[j] - y.at[j]);
}

template <bool Aligned>
__global__ void __launch_bounds__(block_threads, Aligned ? 7 : 5)
    log_prob_backward_kernel(LogProbBackward op, Tiling tiling) {
  constexpr int in_flight = 4;
  const Step& step = op.step;
  const Tile tile = tile_of(blockIdx.x, tiling, 1);
  const int64_t element = first_element(tile.chunk, threadIdx.x);
  const int owned = owned_elements(element, step.count);
  if (owned == 0) return;
  const int64_t first = tile.row * step.count + element, row_branch = tile.row * step.branches;

  const Bits v = fetch<Aligned>(step.velocity, first, owned);
  const Bits x = fetch<Aligned>(step.latents, first, owned);
  Bits held[in_flight];
  float grads[in_flight];
  const auto fetch_from = [&](int64_t g) {
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      held[i] = {};
      grads[i] = 0.0f;
      if (g + i < step.branches) {
        held[i] = fetch<Aligned>(op.x_next, (row_branch + g + i) * step.count + element, owned);
        grads[i] = __ldg(op.grad_log_prob + row_branch + g + i);
      }
    }
  };
  fetch_from(0);

  const Coefficients k = coefficients_of(step.table, step.table_stride, tile.row);
  const Eight mean =
      mean_of(k, values(x, step.latents.dtype), values(v, step.velocity.dtype));
  Eight total = {};
  float sum_of_grads = 0.0f;
  for (int64_t g = 0; g < step.branches; g += in_flight) {
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      if (g + i < step.branches) {
        const Eight next = values(held[i], op.x_next.dtype);
#pragma unroll
        for (int j = 0; j < 8; ++j) total.at[j] += grads[i] * (next.at[j] - mean.at[j]);
        sum_of_grads += grads[i];
      }
    }
    fetch_from(g + in_flight);
  }

  const float scale = op.scale != nullptr ? *op.scale : 1.0f;
  const GradientFactors f =
      gradient_factors(k, step.count, scale, sum_of_grads, op.kl_weight, step.rows);
  add_drift<Aligned>(total, f.old, step.velocity, op.old_velocity, first, owned);
  add_drift<Aligned>(total, f.reference, step.velocity, op.reference_velocity, first, owned);
#pragma unroll
  for (int j = 0; j < 8; ++j) total.at[j] *= f.whole;
  store_as<Aligned>(op.grad_velocity, step.velocity.dtype, first, owned, total);
}

// ---- Advantages ----

struct Weights {
  double of_model[most_models];
};

// By a template parameter, not at run time: a branch would keep the loads of a loop apart.
template <Dtype dtype>
G2RPO_DEVICE double reward_at(const void* rewards, int64_t i) {
  if constexpr (dtype == Dtype::float32) return __ldg(static_cast<const float*>(rewards) + i);
  const uint16_t half = __ldg(static_cast<const uint16_t*>(rewards) + i);
  return dtype == Dtype::bfloat16 ? float_of_bf16(half) : half_to_float(half);
}

// A thread a sample and position, which goes through its group's rewards itself: they are few, and
// it is the caches that hold them. rewards [R, J, groups * G, K] -> advantages [groups * G, K].
template <Dtype dtype>
__global__ void __launch_bounds__(block_threads)
    group_advantages_kernel(GroupAdvantages op, Weights weights) {
  const int64_t size = op.groups * op.group_size * op.positions;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x;
  if (own >= size) return;
  const int64_t sample = own / op.positions, position = own - sample * op.positions;
  const int64_t group = sample / op.group_size * op.group_size * op.positions + position;

  const void* rewards = op.rewards.data;
  double advantage = 0.0;
  for (int64_t r = 0; r < op.models; ++r) {
    double of_model = 0.0;
    for (int64_t j = 0; j < op.granularities; ++j) {
      const int64_t table = (r * op.granularities + j) * size, first = table + group;
      double lowest = reward_at<dtype>(rewards, first), highest = lowest, sum = 0.0;
      bool finite = true;
#pragma unroll 4
      for (int64_t i = 0; i < op.group_size; ++i) {
        const double x = reward_at<dtype>(rewards, first + i * op.positions);
        finite = finite && x - x == 0.0;  // neither NaN nor infinite
        lowest = x < lowest ? x : lowest;
        highest = x > highest ? x : highest;
        sum += x;
      }
      if (!finite || !(highest > lowest)) continue;  // counts as 0
      const double mean = sum / static_cast<double>(op.group_size);
      double squares = 0.0;
#pragma unroll 4
      for (int64_t i = 0; i < op.group_size; ++i) {
        const double gap = reward_at<dtype>(rewards, first + i * op.positions) - mean;
        squares += gap * gap;
      }
      const double deviation = sqrt(squares / static_cast<double>(op.group_size - 1));
      of_model += (reward_at<dtype>(rewards, table + own) - mean) / (deviation + op.eps);
    }
    advantage += weights.of_model[r] * of_model;
  }
  op.advantages[own] = static_cast<float>(advantage);
}

}  // namespace g2rpo::cuda
