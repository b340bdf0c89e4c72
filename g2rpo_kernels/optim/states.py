"""The states of an AdamW8bit: made, saved, loaded, moved to the host and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .host import HostMemory
from .parts import PARAM_DTYPES, Slot, check_group, make_slot, own_state, state_layout
from .sharding import as_dtensor, local, stepped_shape

FIXED = ("block_size", "master_bits", "codec")  # of a group, for as long as its states live


class OptimizerStates(torch.optim.Optimizer):
    """What of AdamW8bit is no arithmetic."""

    def _set_up(self) -> None:
        self.skipped_steps = 0  # for gradients that were not finite
        self.last_non_finite: list[str] = []  # parameters of the last step that was skipped
        self._slots: list[Slot] = []
        self._block_sizes: list[int] = []  # that the slots were made for
        self._host = HostMemory()
        self._offloaded = False

    def _current_slots(self) -> list[Slot]:
        """Wrappers of optimizers replace what is in the groups: made anew where that happened."""
        given = (p for group in self.param_groups for p in group["params"])
        if (
            [id(slot.param) for slot in self._slots] != [id(p) for p in given]
            or [group["block_size"] for group in self.param_groups] != self._block_sizes
        ):
            self._make_slots()
        return self._slots

    def _make_slots(self) -> None:
        slots: list[Slot] = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for j, param in enumerate(group["params"]):
                name = names[j] if names else f"group {i}, parameter {j}"
                slots.append(make_slot(param, name, i, len(slots), group["block_size"]))
        self._slots = slots
        self._block_sizes = [group["block_size"] for group in self.param_groups]

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the states that are not there, which otherwise a parameter's first step does."""
        for slot in self._current_slots():
            self._state_of(slot)

    def _state_of(self, slot: Slot) -> dict[str, Any]:
        param = slot.param
        state = self.state[param]
        if not state:
            if param.dtype not in PARAM_DTYPES:
                raise TypeError(
                    f"{slot.name} has dtype {param.dtype}; expected bfloat16 or float32"
                )
            layout = state_layout(
                stepped_shape(slot), param.dtype, self.param_groups[slot.group]
            )
            device = local(param).device
            state.update(
                {"step": 0, "dtype": PARAM_DTYPES[param.dtype]}
                | {
                    key: torch.zeros(shape, dtype=dtype, device=device)
                    for key, (shape, dtype) in layout.items()
                }
            )
        return state

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """As torch's, for a distributed checkpoint to save here and load on other processes.

        Tensors of parameters that are stepped by shards are DTensors placed as the parameter, of
        the whole state's shape; all others are ordinary tensors of the whole, and equal on every
        process that has the parameter. They share memory with the states, except that DTensors of
        offloaded states are copies on the parameters' device. No collective.
        """

        def put(_: Any, made: dict[str, Any]) -> dict[str, Any]:
            states = dict(made["state"])
            for slot in self._current_slots():
                if slot.sharded and slot.index in states:
                    states[slot.index] = self._as_dtensors(slot, states[slot.index])
            return {**made, "state": states}

        hook = self.register_state_dict_post_hook(put, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _as_dtensors(self, slot: Slot, state: Mapping[str, Any]) -> dict[str, Any]:
        param = slot.param
        layout = state_layout(param.shape, param.dtype, self.param_groups[slot.group])
        return {
            key: as_dtensor(slot, value, layout[key][0]) if isinstance(value, Tensor) else value
            for key, value in state.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `state_dict()` gave, bit for bit, in copies on the parameters' devices.

        Tensors are of whole parameters, however many processes saved them: of those a process takes
        its own rows, and copies no others. Of a parameter that is stepped by shards they may be
        DTensors placed as it is. No collective.

        Raises ValueError, before anything changes, for other groups, another block_size,
        master_bits or codec, or states that are not of these parameters (their shapes, their
        dtypes, their placements). Post-hooks of loading run before the states are in place.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        def take(_: Any, given: Mapping[str, Any]) -> dict[str, Any]:
            loaded.update(self._checked(given))
            return {**given, "state": {}}  # torch would cast the states to the parameters' dtypes

        hook = self.register_load_state_dict_pre_hook(take)
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            hook.remove()
        self.state.clear()
        self._let_go()
        self._offloaded = False
        for param, state in loaded.items():
            device = local(param).device
            self.state[param] = {
                key: value.detach().to(device, copy=True).contiguous()
                if isinstance(value, Tensor) else value
                for key, value in state.items()
            }  # fmt: skip

    def _checked(self, given: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The states of a state dict, by parameter."""
        groups, mine = given["param_groups"], self.param_groups
        lengths = [[len(group["params"]) for group in some] for some in (groups, mine)]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"the state dict has groups of {lengths[0]} parameters; expected {lengths[1]}"
            )
        for i, (theirs, ours) in enumerate(zip(groups, mine)):
            for name in FIXED:
                if theirs.get(name) != ours[name]:
                    raise ValueError(
                        f"group {i}: the state dict has {name} {theirs.get(name)!r}, this "
                        f"optimizer {ours[name]!r}; expected the same"
                    )
            check_group(f"the state dict's group {i}: ", theirs, lr_may_be_zero=True)
        ids = [i for group in groups for i in group["params"]]
        loaded = {}
        for slot, i in zip(self._current_slots(), ids):
            if state := given["state"].get(i):
                loaded[slot.param] = own_state(slot, state, mine[slot.group])
        return loaded

    def __getstate__(self) -> dict[str, Any]:
        if self._offloaded:
            raise RuntimeError("the states are in host memory; expected restore() before copying")
        counted = {name: getattr(self, name) for name in ("skipped_steps", "last_non_finite")}
        return {**super().__getstate__(), **counted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_slots" not in self.__dict__:  # a copy, and not load_state_dict
            self._set_up()
        super().__setstate__(state)

    @torch.no_grad()
    def offload(self) -> None:
        """Move the states of parameters on a GPU to pinned host memory, until `restore()`.

        The host memory is kept and used again. Until then step() is refused; state_dict() is not.
        """
        slots = self._current_slots()
        leaving = {
            (slot.index, key): value
            for slot in slots
            for key, value in self.state.get(slot.param, {}).items()
            if isinstance(value, Tensor) and value.device.type != "cpu"
        }
        self._let_go()
        for (index, key), value in self._host.hold(leaving).items():
            self.state[slots[index].param][key] = value
        self._offloaded = True

    @torch.no_grad()
    def restore(self) -> None:
        """Move the states back to their parameters' devices."""
        for param, state in self.state.items():
            device = local(param).device
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device, non_blocking=True)
        self._offloaded = False

    def _let_go(self) -> None:
        """Of the states' tensors, which else would live on."""
        for slot in self._slots:
            slot.owners = (None,) * 5
