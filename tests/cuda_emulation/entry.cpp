// The launchers of csrc/flow.cu, run through this folder's cuda_runtime.h, for ctypes.
#include <cuda_runtime.h>

#include "flow.cu"

#define ENTRY(op, Arguments)                                          \
  const char* emulated_##op(const g2rpo::Arguments* a, int device) {  \
    return g2rpo::cuda::op(*a, {device, nullptr});                    \
  }

extern "C" {

ENTRY(step_mean, StepMean)
ENTRY(ode_step, OdeStep)
ENTRY(normal, Normal)
ENTRY(sde_step, SdeStep)
ENTRY(branch_log_prob, BranchLogProb)
ENTRY(policy_loss, PolicyLoss)
ENTRY(log_prob_backward, LogProbBackward)
ENTRY(group_advantages, GroupAdvantages)

const char* emulated_probe(int device) { return g2rpo::cuda::probe(device); }

int64_t emulated_scratch_size(int64_t rows, int64_t branches, int64_t count, int64_t extras) {
  return g2rpo::cuda::scratch_size(rows, branches, count, extras);
}

// What block `block` owns: row, chunk, its branches from, to, and thread `thread`'s first element,
// how many it has; then the number of blocks and of chunks.
void emulated_tile(int64_t rows, int64_t branches, int64_t count, int group, uint32_t block,
                   uint32_t thread, int64_t out[8]) {
  using namespace g2rpo::cuda;
  const Tiling tiling = tiling_of(rows, branches, count, group);
  const Tile tile = tile_of(block, tiling, branches);
  const int64_t first = first_element(tile.chunk, thread);
  const int64_t all[8] = {tile.row, tile.chunk, tile.begin, tile.end, first,
                          owned_elements(first, count), tiling.blocks, tiling.chunks};
  std::copy(all, all + 8, out);
}

}  // extern "C"
