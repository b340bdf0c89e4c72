"""States of AdamW8bit and of bitsandbytes' optimizer of that name, one made of the other.

    theirs.load_state_dict(gk.optim.to_bitsandbytes(ours.state_dict()))
    ours.load_state_dict(gk.optim.from_bitsandbytes(theirs.state_dict(), ours))

As in bitsandbytes 0.50: codes of the dynamic map, which is sorted and so has our codes' order, a
float32 absmax a block of 256; parameters of fewer than 4096 elements have float32 moments there, of
which ours are the nearest codes. Weights are no part of either state: what `low_bits` adds to a
bfloat16 is lost on the way there, and begins as 0 on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..gradient_factors import is_dtensor
from .arithmetic import decode, dynamic_code, encode
from .parts import PARAM_DTYPES, state_layout, with_scales_of

if TYPE_CHECKING:
    from . import AdamW8bit

BLOCK_SIZE = 256
LEAST_8BIT = 4096  # elements of a parameter whose moments bitsandbytes keeps in 8 bits
WRAPPED = "__bnb_optimizer_quant_state__"  # where its newer versions hide the tensors from FSDP
OURS = ("master_bits", "block_size", "codec", "seed")
THEIRS = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # of their other optimizers
MOMENTS = (("exp_avg", "state1", 1, True), ("exp_avg_sq", "state2", 2, False))


def to_bitsandbytes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A `state_dict()` of gk.AdamW8bit as `bitsandbytes.optim.AdamW8bit.load_state_dict` takes it.

    The tensors are not copied where they can be shared. Raises ValueError for another codec than
    "dynamic" or another block size than 256, and for DTensors.
    """
    for i, group in enumerate(state_dict["param_groups"]):
        for name, expected in (("codec", "dynamic"), ("block_size", BLOCK_SIZE)):
            if group[name] != expected:
                raise ValueError(
                    f"group {i} has {name} {group[name]!r}; expected {expected!r}, which is what "
                    "bitsandbytes has"
                )
    return {
        "state": {i: _to_theirs(f"state {i}", s) for i, s in state_dict["state"].items()},
        "param_groups": [
            THEIRS | {name: value for name, value in group.items() if name not in OURS}
            for group in state_dict["param_groups"]
        ],
    }


def from_bitsandbytes(state_dict: Mapping[str, Any], optimizer: AdamW8bit) -> dict[str, Any]:
    """A `state_dict()` of bitsandbytes' AdamW8bit as `optimizer.load_state_dict` takes it.

    optimizer: of the same parameters in the same order and groups, with codec "dynamic" and block
        size 256; it is not changed. lr, betas, eps and weight_decay are bitsandbytes'. Where it has
        DTensors the states are still those of the whole parameters.

    Raises ValueError for states of other parameters, another code, or not blockwise.
    """
    mine = optimizer.param_groups
    for i, group in enumerate(mine):
        if (group["codec"], group["block_size"]) != ("dynamic", BLOCK_SIZE):
            raise ValueError(
                f"group {i} of the optimizer has codec {group['codec']!r} and block_size "
                f"{group['block_size']}; expected 'dynamic' and {BLOCK_SIZE}, bitsandbytes'"
            )
    lengths = [[len(g["params"]) for g in some] for some in (state_dict["param_groups"], mine)]
    if lengths[0] != lengths[1]:
        raise ValueError(f"state_dict has groups of {lengths[0]} parameters; expected {lengths[1]}")
    states, groups = {}, []
    for theirs, group in zip(state_dict["param_groups"], mine):
        kept = {name: value for name, value in theirs.items() if name not in THEIRS}
        groups.append(kept | {name: group[name] for name in OURS})
        for i, param in zip(theirs["params"], group["params"]):
            if state := state_dict["state"].get(i):
                states[i] = _from_theirs(f"state {i}", state, param, group)
    return {"state": states, "param_groups": groups}


def _to_theirs(where: str, state: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"step": state["step"]}
    for ours, name, number, signed in MOMENTS:
        codes = state[ours]
        if is_dtensor(codes):
            raise ValueError(
                f"{where} has {ours} as a DTensor; expected ordinary tensors (its full_tensor()), "
                "which is what bitsandbytes has"
            )
        scale = state[f"{ours}_scale"].reshape(-1)
        if codes.numel() >= LEAST_8BIT:
            made[name], made[f"absmax{number}"] = codes, scale
            made[f"qmap{number}"] = dynamic_code(signed, codes.device).value
        else:
            made[name] = decode(_rows(codes, scale), scale, "dynamic", signed).view(-1)
            made[name] = made[name][: codes.numel()].view(codes.shape)
    return made


def _from_theirs(
    name: str, state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]
) -> dict[str, Any]:
    state = {**state, **state.get(WRAPPED, {})}
    made: dict[str, Any] = {"step": int(state["step"]), "dtype": PARAM_DTYPES[param.dtype]}
    for ours, theirs, number, signed in MOMENTS:
        moment = state.get(theirs)
        if moment is None or moment.shape != param.shape:
            given = "none" if moment is None else tuple(moment.shape)
            raise ValueError(
                f"{name} has {theirs} of shape {given}; expected {tuple(param.shape)}"
            )
        if moment.dtype is torch.float32:
            made[ours], made[f"{ours}_scale"] = _quantized(moment, signed)
            continue
        absmax, qmap = state.get(f"absmax{number}"), state.get(f"qmap{number}")
        if moment.dtype is not torch.uint8 or absmax is None or qmap is None:
            raise ValueError(
                f"{name} has {theirs} {moment.dtype} and {sorted(state)}; expected float32, or "
                f"uint8 with absmax{number} and qmap{number}: blockwise states"
            )
        if not torch.allclose(qmap.cpu(), dynamic_code(signed).value, rtol=1e-5, atol=1e-9):
            raise ValueError(f"{name} has another qmap{number} than bitsandbytes' dynamic map")
        made[ours], made[f"{ours}_scale"] = moment, absmax
    layout = state_layout(param.shape, param.dtype, group)
    if "low_bits" in layout:
        shape, dtype = layout["low_bits"]
        made["low_bits"] = torch.zeros(shape, dtype=dtype, device=made["exp_avg"].device)
    return with_scales_of(layout, made)


def _quantized(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    blocks = -(-moment.numel() // BLOCK_SIZE)
    rows = _rows(moment, torch.empty(blocks))
    scale = rows.abs().amax(1)
    codes = encode(rows, scale, "dynamic", signed).view(-1)[: moment.numel()]
    return codes.view(moment.shape), scale


def _rows(x: Tensor, scale: Tensor) -> Tensor:  # -> [B, 256], the last row filled up with zeros
    flat = x.reshape(-1)
    missing = scale.numel() * BLOCK_SIZE - flat.numel()
    return torch.nn.functional.pad(flat, (0, missing)).view(-1, BLOCK_SIZE)
