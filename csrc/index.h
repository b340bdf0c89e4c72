// Which block, thread and slot of scratch own which elements: integers only, so that the host can
// test them at sizes no test could run.
//
// A row of N elements is cut into chunks of 1024, a block's share: 128 threads of 8 consecutive
// elements each. A block does one chunk of one row, for a group of that row's branches.
#pragma once

#include "flow.h"

namespace g2rpo::cuda {

constexpr int thread_elements = 8;  // one 16-byte access of half precision, two of float32
constexpr int block_threads = 128;
constexpr int block_warps = block_threads / 32;
constexpr int chunk_elements = thread_elements * block_threads;

// Below this many chunks of all rows together, a block for each would leave multiprocessors idle:
// the branches are split over blocks too, which then read velocity and latents again.
constexpr int64_t enough_blocks = 1024;

struct Tiling {
  int64_t chunks;       // of a row; at least 1, so that empty rows are still summed and written
  int64_t groups;       // of branches of a row
  int64_t group_size;   // branches of a group, but for the last
  int64_t blocks;       // rows * groups * chunks
};

G2RPO_INLINE int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

G2RPO_INLINE int64_t chunks_of(int64_t count) {
  return count > 0 ? divide_up(count, chunk_elements) : 1;
}

// smallest_group: as many branches as a thread has in flight at once.
G2RPO_INLINE Tiling tiling_of(int64_t rows, int64_t branches, int64_t count, int smallest_group) {
  const int64_t chunks = chunks_of(count);
  const bool split = rows * chunks < enough_blocks && branches > smallest_group;
  const int64_t group_size = split ? smallest_group : branches;
  const int64_t groups = split ? divide_up(branches, group_size) : 1;
  return {chunks, groups, group_size, rows * groups * chunks};
}

struct Tile {
  int64_t row, chunk;
  int64_t begin, end;  // branches
};

// A grid has less than 2^31 blocks, so the divisions need 32 bits only.
G2RPO_INLINE Tile tile_of(uint32_t block, const Tiling& t, int64_t branches) {
  const uint32_t chunks = static_cast<uint32_t>(t.chunks), groups = static_cast<uint32_t>(t.groups);
  const uint32_t rest = block / chunks, row = rest / groups;
  const int64_t begin = (rest - row * groups) * t.group_size, end = begin + t.group_size;
  return {row, block - rest * chunks, begin, end < branches ? end : branches};
}

// First of the 8 elements of a thread, within a row.
G2RPO_INLINE int64_t first_element(int64_t chunk, uint32_t thread) {
  return chunk * chunk_elements + thread * thread_elements;
}

// How many of these 8 a row of `count` elements has.
G2RPO_INLINE int owned_elements(int64_t first, int64_t count) {
  const int64_t left = count - first;
  return left >= thread_elements ? thread_elements : (left > 0 ? static_cast<int>(left) : 0);
}

// ---- Scratch: partial sums [P, slots, chunks], then what finish_policy_loss_kernel keeps ----

constexpr int finish_threads = 256;  // and its most blocks: the last one has a thread for each
constexpr int finish_warps = finish_threads / 32;
constexpr int loss_sums = 6;  // loss, ratio, largest ratio, outside, approx_kl, kl

// Slots: the branches, then one for reference_velocity and old_velocity each where given.
G2RPO_INLINE int64_t partial_at(int64_t row, int64_t slots, int64_t slot, int64_t chunks) {
  return (row * slots + slot) * chunks;
}

G2RPO_INLINE int64_t finish_blocks(int64_t rows) {
  const int64_t blocks = divide_up(rows, finish_warps);
  return blocks < finish_threads ? blocks : finish_threads;
}

}  // namespace g2rpo::cuda
