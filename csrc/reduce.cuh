// Sums in one fixed order, so that a row's bits depend on that row alone: a thread's 8 elements one
// after the other, the lanes of a warp by a butterfly, the warps of a block in order, and then, by
// another kernel, the chunks of a row.
#pragma once

#include "vector.cuh"

namespace g2rpo::cuda {

// sum (x - y)^2 over a thread's elements. Every log-probability starts here.
template <bool Aligned>
G2RPO_DEVICE float sum_of_squares(const Eight& x, const Eight& y, int owned) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float d = x.at[j] - y.at[j];
    if (Aligned || j < owned) sum += d * d;
  }
  return owned > 0 ? sum : 0.0f;
}

// Every lane gets the same bits, since addition commutes.
template <int Count>
G2RPO_DEVICE void sum_over_warp(float (&x)[Count]) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < Count; ++i) x[i] += __shfl_xor_sync(0xFFFFFFFFu, x[i], distance);
  }
}

// The sums of up to 32 slots (branches, or gaps between velocities) of one block, collected in
// shared memory so that a barrier serves all of them.
constexpr int most_slots = 32;

struct alignas(16) SlotSums {
  float of_warp[most_slots][block_warps];
};

template <int Count>
G2RPO_DEVICE void put_slots(SlotSums& shared, int slot, float (&x)[Count]) {
  sum_over_warp(x);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < Count; ++i) shared.of_warp[slot + i][threadIdx.x / 32] = x[i];
  }
}

// Writes `slots` sums, `stride` apart. Called by the whole block.
G2RPO_DEVICE void write_slots(const SlotSums& shared, int slots, float* partial, int64_t stride) {
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < slots) {
    float sum = shared.of_warp[threadIdx.x][0];
#pragma unroll
    for (int warp = 1; warp < block_warps; ++warp) sum += shared.of_warp[threadIdx.x][warp];
    partial[threadIdx.x * stride] = sum;
  }
  __syncthreads();
}

// A warp's sum of one slot's chunks, in every lane.
G2RPO_DEVICE float sum_chunks(const float* partial, int64_t chunks) {
  constexpr int in_flight = 4;
  float sum[1] = {0.0f};
  for (int64_t first = threadIdx.x % 32; first < chunks; first += 32 * in_flight) {
    float part[in_flight];
#pragma unroll
    for (int i = 0; i < in_flight; ++i) {
      const int64_t chunk = first + 32 * i;
      part[i] = chunk < chunks ? __ldg(partial + chunk) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < in_flight; ++i) sum[0] += part[i];
  }
  sum_over_warp(sum);
  return sum[0];
}

}  // namespace g2rpo::cuda
