// As much of the CUDA runtime as csrc/*.cu use, on a CPU: so that their kernels run where no GPU
// is. The threads of a block are fibers that switch at barriers and shuffles, the blocks run one
// after the other, both in either order. Slow, and blind to a wrong fence between blocks; but indices,
// masks, reductions, launch sizes and missing barriers show.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static  // one block runs at a time
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned n = 1) : x(n) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

enum class Wait { nothing, warp, block, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 << 10);
  Wait wait = Wait::nothing;
  unsigned shuffles = 0;
  uint32_t shuffled[2];  // two, since a lane may be one shuffle ahead of the others
};

inline std::vector<Fiber> fibers(1024);
inline ucontext_t scheduler;
inline std::function<void()> body;
inline bool reversed = false;                                        // threads and blocks
inline int64_t first_block = 0, last_block = INT64_MAX, blocks_run = 0;  // what of a grid runs

inline void stop_at(Wait wait) {
  Fiber& fiber = fibers[threadIdx.x];
  fiber.wait = wait;
  swapcontext(&fiber.context, &scheduler);
}

inline void run_fiber() {
  body();
  stop_at(Wait::done);
}

// Lets go of fibers first .. last if all of them wait for each other.
inline bool release(unsigned first, unsigned last, Wait wait) {
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].wait != wait) return false;
  }
  for (unsigned i = first; i < last; ++i) fibers[i].wait = Wait::nothing;
  return true;
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.wait = Wait::nothing;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  // A warp goes as far as it can before the next one starts: to the barrier it cannot pass.
  const unsigned warps = (threads + 31) / 32;
  do {
    for (unsigned n = 0; n < warps; ++n) {
      const unsigned first = 32 * (reversed ? warps - 1 - n : n);
      const unsigned last = std::min(first + 32, threads);
      do {
        for (unsigned lane = first; lane < last; ++lane) {
          const unsigned i = reversed ? last - 1 - (lane - first) : lane;
          if (fibers[i].wait != Wait::nothing) continue;
          threadIdx.x = i;
          swapcontext(&scheduler, &fibers[i].context);
        }
      } while (release(first, last, Wait::warp));
    }
  } while (release(0, threads, Wait::block));
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i].wait != Wait::done) {
      std::fprintf(stderr, "thread %u waits for threads that never come\n", i);
      std::abort();
    }
  }
}

}  // namespace emulation

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T x) {
  *to = x;
}
inline void __threadfence() {}
inline void __syncthreads() { emulation::stop_at(emulation::Wait::block); }

namespace emulation {

// Gives the lanes of a warp each other's x, in `shuffled[turn]`.
inline unsigned exchange(unsigned mask, uint32_t x) {
  if (mask != 0xFFFFFFFFu) std::abort();
  Fiber& own = fibers[threadIdx.x];
  const unsigned turn = own.shuffles++ % 2;
  own.shuffled[turn] = x;
  stop_at(Wait::warp);
  return turn;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int distance) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const unsigned turn = emulation::exchange(mask, bits);
  const unsigned other = threadIdx.x ^ static_cast<unsigned>(distance);
  std::memcpy(&x, &emulation::fibers[other].shuffled[turn], 4);
  return x;
}

inline uint32_t __reduce_max_sync(unsigned mask, uint32_t x) {
  const unsigned turn = emulation::exchange(mask, x), first = threadIdx.x & ~31u;
  for (unsigned i = first; i < first + 32; ++i) x = std::max(x, emulation::fibers[i].shuffled[turn]);
  return x;
}

// c + the sum of the products of their bytes; of a's upper two halves and b's upper two bytes.
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int at = 0; at < 32; at += 8) c += (a >> at & 0xFF) * (b >> at & 0xFF);
  return c;
}
inline uint32_t __dp2a_hi(uint32_t a, uint32_t b, uint32_t c) {
  return c + (a & 0xFFFF) * (b >> 16 & 0xFF) + (a >> 16) * (b >> 24);
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t x) {
  const uint32_t before = *to;
  *to += x;
  return before;
}

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101
};
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed = 2 };
constexpr unsigned cudaStreamNonBlocking = 1;
using cudaStream_t = void*;

namespace emulation {
inline int device = 0;  // of two
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                         : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  return emulation::device = device, cudaSuccess;
}
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const unsigned threads = config->blockDim.x;
  if (config->gridDim.x == 0 || threads == 0 || threads > emulation::fibers.size()) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  emulation::body = [&] { kernel(arguments...); };
  const int64_t first = emulation::first_block;
  const int64_t last = std::min<int64_t>(gridDim.x, emulation::last_block);
  for (int64_t n = first; n < last; ++n, ++emulation::blocks_run) {
    blockIdx.x = static_cast<unsigned>(emulation::reversed ? last - 1 - (n - first) : n);
    emulation::run_block(threads);
  }
  return cudaSuccess;
}
