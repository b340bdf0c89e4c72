// Kernels of one step: step_mean, ode_step, normal, sde_step, and the squares behind every
// log-probability. `Aligned`: every row of every array starts at a 16-byte boundary and N % 8 == 0.
#pragma once

#include "reduce.cuh"

namespace g2rpo::cuda {

template <bool Aligned>
__global__ void __launch_bounds__(block_threads) step_mean_kernel(StepMean op, Tiling tiling) {
  const Step& step = op.step;
  const Tile tile = tile_of(blockIdx.x, tiling, 1);
  const int64_t element = first_element(tile.chunk, threadIdx.x);
  const int owned = owned_elements(element, step.count);
  const int64_t first = tile.row * step.count + element;
  const Bits v = fetch<Aligned>(step.velocity, first, owned);
  const Bits x = fetch<Aligned>(step.latents, first, owned);
  const Coefficients k = coefficients_of(step.table, step.table_stride, tile.row);
  store<Aligned>(op.mean, first, owned,
                 mean_of(k, values(x, step.latents.dtype), values(v, step.velocity.dtype)));
}

template <bool Aligned>
__global__ void __launch_bounds__(block_threads) ode_step_kernel(OdeStep op, Tiling tiling) {
  const Tile tile = tile_of(blockIdx.x, tiling, 1);
  const int64_t element = first_element(tile.chunk, threadIdx.x);
  const int owned = owned_elements(element, op.count);
  const int64_t first = tile.row * op.count + element;
  const Bits v = fetch<Aligned>(op.velocity, first, owned);
  const Bits x = fetch<Aligned>(op.latents, first, owned);
  const float delta = op.sigma_next[tile.row * op.sigma_next_stride] -
                      op.sigma[tile.row * op.sigma_stride];
  const Eight velocity = values(v, op.velocity.dtype);
  Eight next = values(x, op.latents.dtype);
#pragma unroll
  for (int j = 0; j < 8; ++j) next.at[j] = next.at[j] + delta * velocity.at[j];
  store<Aligned>(op.x_next, first, owned, next);
}

template <bool Aligned>
__global__ void __launch_bounds__(block_threads) normal_kernel(Normal op, Tiling tiling) {
  const Tile tile = tile_of(blockIdx.x, tiling, 1);
  const int64_t element = first_element(tile.chunk, threadIdx.x);
  const int owned = owned_elements(element, op.count);
  if (owned == 0) return;
  store<Aligned>(op.noise, tile.row * op.count + element, owned,
                 normal8(element, static_cast<uint64_t>(op.seeds[tile.row])));
}

// ---- Where a branch's x_next comes from ----
//
// fetch(): the loads of a branch; in_flight branches' before the first use. x_next(): the values,
// once stored. branch: p * G + g. blocks_at_once: of a multiprocessor, which bounds the registers.

struct StoredNext {
  static constexpr int in_flight = 4, blocks_at_once = 8;
  using Held = Bits;
  Array array;  // x_next [P, G, N]

  template <bool Aligned>
  G2RPO_DEVICE Bits fetch(int64_t branch, int64_t count, int64_t element, int owned) const {
    return cuda::fetch<Aligned>(array, branch * count + element, owned);
  }
  template <bool Aligned>
  G2RPO_DEVICE Eight x_next(const Bits& bits, Coefficients, const Eight&, int64_t, int64_t, int64_t,
                            int) const {
    return values(bits, array.dtype);
  }
};

G2RPO_DEVICE Eight branch_of(Coefficients k, const Eight& mean, const Eight& noise) {
  Eight next;
#pragma unroll
  for (int j = 0; j < 8; ++j) next.at[j] = branch(k, mean.at[j], noise.at[j]);
  return next;
}

struct GivenNoise {
  static constexpr int in_flight = 4, blocks_at_once = 8;
  using Held = Bits;
  Array noise;  // [P, G, N]
  float* out;   // x_next [P, G, N]

  template <bool Aligned>
  G2RPO_DEVICE Bits fetch(int64_t branch, int64_t count, int64_t element, int owned) const {
    return cuda::fetch<Aligned>(noise, branch * count + element, owned);
  }
  template <bool Aligned>
  G2RPO_DEVICE Eight x_next(const Bits& bits, Coefficients k, const Eight& mean, int64_t branch,
                            int64_t count, int64_t element, int owned) const {
    const Eight next = branch_of(k, mean, values(bits, noise.dtype));
    store<Aligned>(out, branch * count + element, owned, next);
    return next;
  }
};

struct DrawnNoise {
  static constexpr int in_flight = 1, blocks_at_once = 12;
  struct Held {};
  const int64_t* seeds;  // [P, G]
  float* out;            // x_next [P, G, N]

  template <bool Aligned>
  G2RPO_DEVICE Held fetch(int64_t, int64_t, int64_t, int) const {
    return {};
  }
  template <bool Aligned>
  G2RPO_DEVICE Eight x_next(Held, Coefficients k, const Eight& mean, int64_t branch, int64_t count,
                            int64_t element, int owned) const {
    const uint64_t seed = static_cast<uint64_t>(seeds[branch]);
    const Eight next = branch_of(k, mean, normal8(element, seed));
    store<Aligned>(out, branch * count + element, owned, next);
    return next;
  }
};

// ---- Squares: partial[p, slot, chunk] = sum over a chunk of (x_next - mean)^2 ----

// Velocities to compare with; each that is given has a slot behind those of the branches.
struct Others {
  Array reference, old;  // [P, N] or null
};

G2RPO_INLINE int count_of(const Others& others) {
  return (others.reference.data != nullptr) + (others.old.data != nullptr);
}

template <bool Aligned, class Source>
G2RPO_DEVICE void sum_branches(const Step& step, const Source& source, const Others& others,
                               const Tiling& tiling, float* partial) {
  constexpr int in_flight = Source::in_flight;
  using Held = typename Source::Held;
  __shared__ SlotSums shared;

  const Tile tile = tile_of(blockIdx.x, tiling, step.branches);
  const int64_t element = first_element(tile.chunk, threadIdx.x);
  const int owned = owned_elements(element, step.count);
  const int64_t first = tile.row * step.count + element;
  const int64_t row_branch = tile.row * step.branches;

  const Bits v = fetch<Aligned>(step.velocity, first, owned);
  const Bits x = fetch<Aligned>(step.latents, first, owned);
  Held held[in_flight];
  const auto fetch_from = [&](int64_t g) {
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      held[i] = {};
      if (g + i < tile.end) {
        held[i] = source.template fetch<Aligned>(row_branch + g + i, step.count, element, owned);
      }
    }
  };
  fetch_from(tile.begin);

  const Coefficients k = coefficients_of(step.table, step.table_stride, tile.row);
  const Eight mean =
      mean_of(k, values(x, step.latents.dtype), values(v, step.velocity.dtype));

  int slots = 0;
  float* to = partial + tile.chunk +
              partial_at(tile.row, step.branches + count_of(others), tile.begin, tiling.chunks);
  const auto make_room = [&](int needed) {
    if (slots + needed <= most_slots) return;
    write_slots(shared, slots, to, tiling.chunks);
    to += slots * tiling.chunks;
    slots = 0;
  };

  for (int64_t g = tile.begin; g < tile.end; g += in_flight) {
    make_room(in_flight);
    float sums[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      sums[i] = 0.0f;
      if (g + i < tile.end) {
        sums[i] = sum_of_squares<Aligned>(
            source.template x_next<Aligned>(held[i], k, mean, row_branch + g + i, step.count,
                                            element, owned),
            mean, owned);
      }
    }
    fetch_from(g + in_flight);
    put_slots(shared, slots, sums);
    slots += static_cast<int>(tile.end - g < in_flight ? tile.end - g : in_flight);
  }

  if (tile.end == step.branches) {
    const auto put_gap = [&](Array other) {
      if (other.data == nullptr) return;
      make_room(1);
      const Bits again = fetch<Aligned>(step.velocity, first, owned);  // cheaper than to keep it
      const Bits o = fetch<Aligned>(other, first, owned);
      float sum[1] = {sum_of_squares<Aligned>(values(again, step.velocity.dtype),
                                              values(o, other.dtype), owned)};
      put_slots(shared, slots++, sum);
    };
    put_gap(others.reference);
    put_gap(others.old);
  }
  write_slots(shared, slots, to, tiling.chunks);
}

template <bool Aligned, class Noise>
__global__ void __launch_bounds__(block_threads, Aligned ? Noise::blocks_at_once : 5)
    sde_step_kernel(Step step, Noise noise, Tiling tiling, float* partial) {
  sum_branches<Aligned>(step, noise, Others{}, tiling, partial);
}

// branch_log_prob, and the first launch of policy_loss, whose second one counts blocks.
template <bool Aligned>
__global__ void __launch_bounds__(block_threads, Aligned ? StoredNext::blocks_at_once : 5)
    branch_squares_kernel(Step step, StoredNext x_next, Others others, Tiling tiling,
                          float* partial, uint32_t* counter) {
  if (counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *counter = 0;
  sum_branches<Aligned>(step, x_next, others, tiling, partial);
}

// A warp a branch: log_prob [P, G] from partial [P, G, chunks].
__global__ void __launch_bounds__(finish_threads)
    finish_log_prob_kernel(Step step, int64_t chunks, const float* partial, float* log_prob) {
  const int64_t branch = static_cast<int64_t>(blockIdx.x) * finish_warps + threadIdx.x / 32;
  if (branch >= step.rows * step.branches) return;
  const float sum = sum_chunks(partial + branch * chunks, chunks);
  const Coefficients k =
      coefficients_of(step.table, step.table_stride, branch / step.branches);
  if (threadIdx.x % 32 == 0) log_prob[branch] = log_prob_of(k, sum, step.count);
}

}  // namespace g2rpo::cuda
