// How the CUDA backend launches: on the stream's device, and with nothing swallowed.
//
// Nothing here allocates, copies, waits or asks the device anything, so that every op may be
// captured into a CUDA graph.
#pragma once

#include <cuda_runtime.h>

#include "ops.h"

namespace g2rpo::cuda {

// Not `<<<>>>`: this returns the error of this very launch, and not one that was left behind.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, Stream stream,
                   const Arguments&... arguments) {
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream.handle);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Runs `launches` with the stream's device current; null or what went wrong.
template <class Launches>
const char* on_device(Stream stream, Launches launches) {
  int previous = stream.device;
  cudaError_t error = cudaGetDevice(&previous);
  const bool moves = error == cudaSuccess && previous != stream.device;
  if (moves) error = cudaSetDevice(stream.device);
  if (error == cudaSuccess) error = launches();
  if (moves) {
    const cudaError_t restored = cudaSetDevice(previous);
    if (error == cudaSuccess) error = restored;
  }
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // reported here, so not once more by whoever asks next
  return cudaGetErrorString(error);
}

}  // namespace g2rpo::cuda
