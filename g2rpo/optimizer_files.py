"""An optimizer's state as files that any number of ranks can write, and any other number read.

PyTorch's distributed checkpoint, in safetensors: every rank writes its own part of every tensor,
`<parameter>.<state>`, and reads what its parts of the parameters need, whoever has written it. What
is no tensor (steps, groups) stays in the training state beside them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from .distributed.shards import as_sharded, local, part_of

FILE_BYTES = 2**31  # of one file, which is put together in host memory


def write_optimizer(
    folder: Path, state: Mapping[str, Any], names: list[str], alone: bool
) -> dict[str, Any]:
    """Write the tensors of an optimizer's state_dict() into `folder`; returns the rest of it.

    names: of its parameters, in their order. alone: there are no other ranks; otherwise all call
    it, with one folder that all can write.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        rest[index] = {}
        for key, value in values.items():
            # Other packages' quantised tensors are classes of their own.
            if type(value) in (Tensor, DTensor) and value.layout is torch.strided:
                tensors[f"{names[index]}.{key}"] = value.detach()
            else:
                rest[index][key] = value
    if tensors:
        folder.mkdir(parents=True, exist_ok=True)
        with _quietly():
            dcp.save(
                tensors, no_dist=alone, storage_writer=dcp.HuggingFaceStorageWriter(
                    str(folder), _files(tensors), save_distributed=True
                ),
            )  # fmt: skip
    return {**state, "state": rest, "written": sorted(tensors)}


def read_optimizer(
    folder: Path, rest: Mapping[str, Any], optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter], alone: bool,
) -> dict[str, Any]:  # fmt: skip
    """The state_dict() that `write_optimizer` was given, for these parameters as they are laid out
    now; on the CPU, but for parts of sharded parameters. optimizer: to be given it; not changed,
    but that AdamW8bit has states after this.

    Also reads what earlier versions wrote, whose tensors are all in `rest`.
    """
    state = {index: dict(values) for index, values in rest["state"].items()}
    names = list(parameters)
    written = rest.get("written", [])
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
    asked: dict[int, dict[str, Any]] = {}
    if sharded and hasattr(optimizer, "init_state"):  # it knows what it keeps in parts
        optimizer.init_state()
        asked = optimizer.state_dict()["state"]
    index_of = {name: index for index, name in enumerate(names)}
    if written:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        with _quietly():
            stored = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for name in written:
            found = stored[name]
            parameter, key = name.rsplit(".", 1)
            like = asked.get(index_of[parameter], {}).get(key)
            tensors[name] = _empty(
                parameters[parameter], found.size, found.properties.dtype, like, bool(asked)
            )
        with _quietly():
            dcp.load(tensors, storage_reader=reader, no_dist=alone)
        for name, value in tensors.items():
            parameter, key = name.rsplit(".", 1)
            state.setdefault(index_of[parameter], {})[key] = value
    elif sharded and not asked:
        for index, values in state.items():
            parameter = parameters[names[index]]
            for key, value in values.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim:
                    values[key] = as_sharded(parameter, part_of(parameter, value).clone())
    return {**{key: value for key, value in rest.items() if key != "written"}, "state": state}


def _empty(
    parameter: Tensor, shape: torch.Size, dtype: torch.dtype, like: Tensor | None, known: bool
) -> Tensor:
    """A tensor to read into. like: what the optimizer has in its place; known: whether it says."""
    if isinstance(like, DTensor):
        return like
    if not known and isinstance(parameter, DTensor) and shape == parameter.shape:
        return as_sharded(parameter, torch.empty_like(local(parameter), dtype=dtype))
    return torch.empty(shape, dtype=dtype)


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Which file, from 1 on, each tensor goes to."""
    places, file, room = {}, 1, FILE_BYTES
    for name, tensor in tensors.items():
        size = local(tensor).nbytes
        if size > room and room < FILE_BYTES:
            file, room = file + 1, FILE_BYTES
        places[name] = file
        room -= size
    return places


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings that a process alone, or safetensors, is used. Raises OSError with what
    has failed, and of several ranks where: PyTorch's own error is no Exception."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.distributed")
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"{cause}" + f" (rank {rank})" * (len(error.failures) > 1)) from error
