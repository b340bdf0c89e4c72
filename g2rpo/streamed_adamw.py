"""StreamedAdamW: the reference's exact arithmetic on one card, its states in host memory.

    opt = StreamedAdamW(transformer.parameters(), lr=2e-6)

A float32 master and two float32 moments are 12 bytes a parameter, 143 GB of FLUX.1-dev. They live
in host memory and pass through the GPU one parameter at a time: while one is updated and goes back,
the next is on its way. A step moves 12 bytes a parameter over the bus each way, both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Elements of one allocation: torch rounds pinned memory up to powers of two, for the modulation
# linears of FLUX.1-dev to half as much again.
CHUNK = 2**30


class StreamedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW on float32 copies of the parameters, to the bit; each parameter is its
    copy, rounded.

    params: as any optimizer's, float32, bfloat16 or float16. A float32 parameter is its own master.
    State of a parameter: `step`, and in host memory, float32 in its shape, `exp_avg`, `exp_avg_sq`
    and `master`; pinned where the parameter is on a CUDA GPU. When step() returns they are
    complete. The master is made of the parameter at its first step: whoever changes the parameter
    after that loads a state_dict that goes with it.

    Raises ValueError for lr <= 0, betas outside [0, 1), negative eps or weight_decay, a parameter
    of another dtype; step() RuntimeError for a sparse gradient.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        for name, value, ok, expected in (
            ("lr", lr, lr > 0, "> 0"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "in [0, 1)"),
            ("eps", eps, eps >= 0, ">= 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
        ):
            if not ok:
                raise ValueError(f"{name} is {value!r}; expected {expected}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                    raise ValueError(
                        f"a parameter is {parameter.dtype}; expected float32, bfloat16 or float16"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work: dict[torch.device, list[tuple[dict, nn.Parameter]]] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise RuntimeError("a gradient is sparse; expected dense ones")
                work.setdefault(parameter.device, []).append((group, parameter))
        self._make_states([p for pairs in work.values() for _, p in pairs])
        for device, pairs in work.items():
            if device.type == "cuda":
                self._stream(device, pairs)
            else:
                for group, parameter in pairs:
                    self._update(group, parameter, _tensors(self.state[parameter]))
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Counterpart of state_dict; strict. The values are copied.

        Raises ValueError for other groups, shapes or dtypes.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        states = {
            parameter: state_dict["state"][index]
            for index, parameter in zip(saved, parameters)
            if index in state_dict["state"]
        }
        for parameter, state in states.items():
            names = _names(parameter)
            if state.keys() != {"step", *names}:
                raise ValueError(
                    f"a parameter's state has {sorted(state)}; expected {sorted(('step', *names))}"
                )
            for name in names:
                value = state[name]
                if value.shape != parameter.shape or value.dtype != torch.float32:
                    raise ValueError(
                        f"a parameter's {name} is {value.dtype} {tuple(value.shape)}; expected "
                        f"float32 {tuple(parameter.shape)}"
                    )
        # torch's own would make the states what the parameters are: bfloat16, and on the GPU.
        super().load_state_dict({**state_dict, "state": {}})
        self.state.clear()
        self._make_states(list(states))
        for parameter, state in states.items():
            self.state[parameter]["step"] = int(state["step"])
            for mine, theirs in zip(_tensors(self.state[parameter]), _tensors(state), strict=True):
                mine.copy_(theirs)

    def _make_states(self, parameters: list[nn.Parameter]) -> None:
        """For those that have none."""
        new = [p for p in parameters if not self.state[p]]
        for parameter, rows in zip(new, _host_rows(new), strict=True):
            names = _names(parameter)
            self.state[parameter] = {"step": 0, **dict(zip(names, rows, strict=True))}
            for name, row in zip(names, rows, strict=True):
                row.copy_(parameter) if name == "master" else row.zero_()

    def _update(self, group: dict, parameter: nn.Parameter, tensors: list[Tensor]) -> None:
        """One step with the parameter's state, which is on its device."""
        self.state[parameter]["step"] += 1
        number = torch.full((), float(self.state[parameter]["step"]), device=parameter.device)
        master = tensors[2] if len(tensors) == 3 else parameter
        grad = parameter.grad.float().contiguous()
        torch._fused_adamw_(
            [master], [grad], [tensors[0]], [tensors[1]], [], [number],
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip
        if master is not parameter:
            parameter.copy_(master)

    def _stream(self, device: torch.device, pairs: list[tuple[dict, nn.Parameter]]) -> None:
        """`_update` for each pair, with two buffers on the GPU that take turns."""
        with torch.cuda.device(device):
            here = torch.cuda.current_stream()
            inwards, outwards = torch.cuda.Stream(), torch.cuda.Stream()
            size = max(sum(t.numel() for t in _tensors(self.state[p])) for _, p in pairs)
            buffers = [torch.empty(size, device=device) for _ in range(2)]
            free: list[torch.cuda.Event | None] = [None, None]
            inwards.wait_stream(here)  # whose memory the buffers may have been

            def fetch(index: int) -> tuple[list[Tensor], torch.cuda.Event]:
                with torch.cuda.stream(inwards):
                    if free[index % 2] is not None:
                        inwards.wait_event(free[index % 2])
                    tensors, at, copies = _tensors(self.state[pairs[index][1]]), 0, []
                    for tensor in tensors:
                        part = buffers[index % 2][at : at + tensor.numel()].view(tensor.shape)
                        copies.append(part.copy_(tensor, non_blocking=True))
                        at += tensor.numel()
                    return copies, inwards.record_event()

            coming = fetch(0)
            for index, (group, parameter) in enumerate(pairs):
                copies, arrived = coming
                if index + 1 < len(pairs):
                    coming = fetch(index + 1)
                here.wait_event(arrived)
                self._update(group, parameter, copies)
                outwards.wait_event(here.record_event())
                with torch.cuda.stream(outwards):
                    for copy, tensor in zip(copies, _tensors(self.state[parameter]), strict=True):
                        tensor.copy_(copy, non_blocking=True)
                    free[index % 2] = outwards.record_event()
            here.wait_stream(outwards)  # before the buffers' memory is anybody else's
            outwards.synchronize()


def _names(parameter: nn.Parameter) -> tuple[str, ...]:
    moments = ("exp_avg", "exp_avg_sq")
    itself = parameter.dtype is torch.float32 and parameter.is_contiguous()
    return moments if itself else (*moments, "master")


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [state[name] for name in ("exp_avg", "exp_avg_sq", "master") if name in state]

def _host_rows(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Uninitialised float32 tensors on the host for `_names` of each parameter, many in one
    allocation; pinned for those on CUDA GPUs."""
    chunks: list[list[nn.Parameter]] = []
    room = 0
    for parameter in parameters:
        size = parameter.numel() * len(_names(parameter))
        if not chunks or size > room or chunks[-1][0].is_cuda != parameter.is_cuda:
            chunks.append([])
            room = CHUNK
        chunks[-1].append(parameter)
        room -= size
    for chunk in chunks:
        size, at = sum(p.numel() * len(_names(p)) for p in chunk), 0
        whole = torch.empty(size, pin_memory=chunk[0].is_cuda)
        for parameter in chunk:
            rows = []
            for _ in _names(parameter):
                rows.append(whole[at : at + parameter.numel()].view(parameter.shape))
                at += parameter.numel()
            yield rows
