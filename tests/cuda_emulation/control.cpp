// What a test sets and asks of the emulation itself, for ctypes.
#include <cuda_runtime.h>

#include <utility>

extern "C" {

int emulated_device() { return emulation::device; }

// Threads and blocks last to first; and which blocks of every grid run.
void emulate(int reversed, int64_t first_block, int64_t last_block) {
  emulation::reversed = reversed != 0;
  emulation::first_block = first_block;
  emulation::last_block = last_block;
}

int64_t emulated_blocks() { return std::exchange(emulation::blocks_run, 0); }

}  // extern "C"
