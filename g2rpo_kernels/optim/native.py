"""AdamW8bit's native backends: one call steps many parameters. And which backend serves a device.

The optimizer is no torch op: it writes its arguments and is never traced. So its backends are not
registered with an `Operator`, but they are chosen as an op's are.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from .. import _library
from ..native import _DTYPES
from .arithmetic import Constants

# By backend name, "cpu" and "cuda": the submodules of g2rpo_kernels._C that this installation has.
EXTENSIONS: dict[str, ModuleType] = {}
WORDS = 10  # of AdamwTensor in csrc/ops.h; `count` is one of them
_COUNT = 7


def backend_for(device: torch.device) -> str:
    """ "cuda", "cpu" or "reference": what steps parameters on `device`.

    Raises RuntimeError where `use_backend` asks for one that AdamW8bit does not have, or that does
    not run there.
    """
    forced = _library._forced
    if forced is None:
        for name in _library.PRIORITY.get(device.type, ()):
            if name in EXTENSIONS and _library.refusal(name, device) is None:
                return name
        if device.type in _library.PRIORITY and device.type not in _library._warned:
            _library._say_the_reference_serves(device)
        return "reference"
    if forced != "reference" and forced not in EXTENSIONS:
        raise RuntimeError(
            f"use_backend({forced!r}): AdamW8bit has no such implementation; "
            f"it has {sorted(['reference', *EXTENSIONS])}"
        )
    reason = _library.refusal(forced, device)
    if reason is not None:
        raise RuntimeError(f"use_backend({forced!r}) with parameters on {device}: {reason}")
    return forced


def step(
    backend: str,
    tensors: Tensor,  # int64 [T, 10]
    k: Constants,
    device: torch.device,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    low_bytes: int,
    block_size: int,
    codec: str,
    zero_grad: bool = False,
) -> None:
    """One step of T parameters of one group, device and set of dtypes, in one pass.

    backend: "cpu" or "cuda", what `backend_for(device)` said.
    tensors: on the host, the words of AdamwTensor in csrc/ops.h: the addresses of the parameter,
        its gradient, exp_avg, exp_avg_sq, exp_avg_scale, exp_avg_sq_scale and low_bits; count,
        first (a multiple of 8), seed. What they point at is contiguous, on `device`, and stays
        until the step is done.
    low_bytes: of one element of low_bits: 0 (none), 1 or 2.
    zero_grad: leave zeros in the gradients.

    On a GPU this queues one launch on the current stream and waits for nothing.
    Nothing is checked: g2rpo_kernels.optim checks before it calls.
    """
    ops, chunks, stream = EXTENSIONS[backend], None, 0
    if backend == "cuda":
        chunks = _chunks(tuple(tensors[:, _COUNT].tolist()), ops.adamw_chunk, device)
    if device.type == "cuda":
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        with torch.cuda.device(device):
            tensors = tensors.pin_memory().to(device, non_blocking=True)
    ops.adamw8bit(
        tensors.data_ptr(), tensors.shape[0],
        0 if chunks is None else chunks.data_ptr(), 0 if chunks is None else chunks.shape[0],
        block_size, _DTYPES[param_dtype], _DTYPES[grad_dtype], low_bytes,
        codec == "dynamic", zero_grad, list(k), device.index or 0, stream,
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _chunks(counts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int32 [C, 2]: the parameter, and which `size` elements of it, of every block of a launch."""
    each = (torch.tensor(counts) + (size - 1)) // size
    owner = torch.arange(len(counts)).repeat_interleave(each)
    first = each.cumsum(0) - each
    place = torch.arange(len(owner)) - first[owner]
    return torch.stack([owner, place], dim=1).to(torch.int32).to(device)
