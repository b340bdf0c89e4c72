"""Host memory for the states of an optimizer, kept from one offload to the next."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

# Bytes of one allocation: torch rounds pinned memory up to powers of two, of a tensor's size to as
# much as twice of it. One for each dtype: torch.save refuses a storage of several.
CHUNK = 2**30
ALIGNMENT = 64  # bytes


class HostMemory:
    """Copies of tensors in host memory, in the same place each time; pinned for those on CUDA."""

    def __init__(self) -> None:
        self._buffers: dict[Hashable, Tensor] = {}
        self._free: dict[torch.dtype, Tensor] = {}  # the rest of the newest chunk of each

    def hold(self, tensors: Mapping[Hashable, Tensor]) -> dict[Hashable, Tensor]:
        """Copies, under the same keys; complete on return, and overwritten by the next of a key."""
        fresh = [key for key, tensor in tensors.items() if not self._fits(key, tensor)]
        needed: dict[torch.dtype, int] = {}  # elements
        for key in fresh:
            dtype = tensors[key].dtype
            needed[dtype] = needed.get(dtype, 0) + _elements(tensors[key])
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        for key in fresh:
            tensor, dtype = tensors[key], tensors[key].dtype
            size, free = _elements(tensor), self._free.get(dtype)
            if free is None or free.numel() < size:
                chunk = max(size, min(CHUNK // dtype.itemsize, needed[dtype]))
                free = torch.empty(chunk, dtype=dtype, pin_memory=pinned)
            self._buffers[key] = free[: tensor.numel()].view(tensor.shape)
            self._free[dtype] = free[size:]
            needed[dtype] -= size
        held = {}
        for key, tensor in tensors.items():
            held[key] = self._buffers[key].copy_(tensor, non_blocking=pinned)
        for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return held

    def _fits(self, key: Hashable, tensor: Tensor) -> bool:
        buffer = self._buffers.get(key)
        return (
            buffer is not None and buffer.shape == tensor.shape and buffer.dtype is tensor.dtype
        )


def _elements(tensor: Tensor) -> int:
    """Of its place: the next one is aligned."""
    step = max(1, ALIGNMENT // tensor.element_size())
    return -(-tensor.numel() // step) * step
