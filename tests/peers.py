"""What the peers' steps compute, from their formulas: the truth of test_compat*.py, in float64.

Then, in `PEERS`, how each function of g2rpo_kernels.compat is called to make such a step.

The formulas are written as the papers and the peers think of a step: predicted image x0 and noise
x1, the score, a drift and a diffusion, never as a*x + b*v + s*eps, and use nothing of
g2rpo_kernels. With float64 inputs all is float64 and differentiable by autograd.

    x0 = x - sigma v        x1 = x + (1 - sigma) v        score = ((1 - sigma) x0 - x) / sigma^2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from g2rpo_kernels import compat

STEPS = 16


class Step(NamedTuple):
    """One step of a batch; sigmas and noise levels have shape [B, 1, ...]."""

    prev_sample: Tensor
    x0: Tensor
    log_prob: Tensor  # [B]
    mean: Tensor
    std: Tensor  # [B, 1, ...], of the whole step
    diffusion: Tensor  # [B, 1, ...], std / sqrt(-dt)
    dt: Tensor  # [B, 1, ...], negative
    scale: Tensor  # [B], the terms of log_prob without their signs: what float32 rounds


def x0_and_x1(velocity: Tensor, latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    return latents - sigma * velocity, latents + (1 - sigma) * velocity


def score(velocity: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """Of the marginal at sigma, N((1 - sigma) x0, sigma^2)."""
    x0, _ = x0_and_x1(velocity, latents, sigma)
    return ((1 - sigma) * x0 - latents) / sigma**2


def euler(velocity: Tensor, latents: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The ODE's step: the predicted image and noise, mixed anew."""
    x0, x1 = x0_and_x1(velocity, latents, sigma)
    return (1 - sigma_next) * x0 + sigma_next * x1


def flow_diffusion(noise_level: Tensor, sigma: Tensor, sigma_max: Tensor) -> Tensor:
    """Flow-GRPO, eq. 9: noise_level * sqrt(sigma / (1 - sigma)), finite at sigma = 1."""
    return noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()


def step(
    dynamics: str,  # "flow", "dance", "dance-ode" (the ODE's mean with dance's noise), "cps"
    velocity: Tensor,
    latents: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: Tensor,
    *,
    sigma_max: Tensor | None = None,
    prev_sample: Tensor | None = None,
    noise: Tensor | None = None,
    constant: bool = True,
) -> Step:
    """prev_sample given, or mean + std * noise. log_prob holds prev_sample constant."""
    x0, x1 = x0_and_x1(velocity, latents, sigma)
    elapsed = sigma - sigma_next
    if dynamics == "cps":
        angle = noise_level * math.pi / 2
        std = sigma_next * angle.sin()
        mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).clamp_min(0).sqrt() * x1
        diffusion = std / elapsed.sqrt()
    else:
        diffusion = noise_level * torch.ones_like(sigma)
        if dynamics == "flow":
            diffusion = flow_diffusion(noise_level, sigma, sigma_max)
        drift = velocity
        if dynamics != "dance-ode":
            drift = velocity - diffusion**2 / 2 * score(velocity, latents, sigma)
        mean = latents - elapsed * drift
        std = diffusion * elapsed.sqrt()
    if prev_sample is None:
        prev_sample = mean + std * noise
    squared = (prev_sample.detach() - mean) ** 2
    exponent = squared if dynamics == "cps" else squared / (2 * std**2)
    exponent = exponent.flatten(1).mean(1)
    entropy = torch.zeros_like(exponent)
    if dynamics != "cps" and constant:
        entropy = (std.log() + math.log(math.sqrt(2 * math.pi))).flatten().expand_as(exponent)
    scale = (exponent + entropy.abs()).detach()
    return Step(prev_sample, x0, -exponent - entropy, mean, std, diffusion, -elapsed, scale)


def schedule(shift: float = 3.0, steps: int = STEPS) -> Tensor:
    """float32 [steps + 1] from 1 to 0, rounded at every operation, as the peers make theirs."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


class Scheduler:
    """What Flow-GRPO and Flow-Factory read of a scheduler, and nothing else of one."""

    def __init__(self, sigmas: Tensor, **changed: object) -> None:
        self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000
        self.is_eval, self.noise_level, self.dynamics_type = False, 0.7, "Flow-SDE"
        self.current_sde_steps = torch.arange(STEPS - 1)
        vars(self).update(changed)

    def index_for_timestep(self, timestep: Tensor, schedule_timesteps: Tensor | None = None) -> int:
        known = self.timesteps if schedule_timesteps is None else schedule_timesteps
        return int((known == timestep).nonzero()[0])


@dataclass
class Call:
    """The tensors of one step, of one index for all rows or of one a row."""

    velocity: Tensor
    latents: Tensor
    sigmas: Tensor
    indices: list[int]
    level: float
    prev_sample: Tensor | None = None
    generator: torch.Generator | None = None

    def timesteps(self) -> Tensor:
        return Scheduler(self.sigmas).timesteps[self.indices]


Named = dict[str, Tensor]  # what a peer returned, by the names of peers.Step


def sde_step_with_logprob(call: Call, **options: object) -> Named:
    got = compat.sde_step_with_logprob(
        Scheduler(call.sigmas), call.velocity, call.timesteps(), call.latents, call.level,
        call.prev_sample, call.generator, **options,
    )  # fmt: skip
    std = "std" if options.get("sde_type") == "cps" else "diffusion"
    return dict(zip(("prev_sample", "log_prob", "mean", std), got, strict=True))


def flux_step(call: Call, **options: object) -> Named:
    options = {"grpo": True, "sde_solver": True} | options
    got = compat.flux_step(
        call.velocity, call.latents, call.level, call.sigmas, call.indices[0], call.prev_sample,
        **options,
    )  # fmt: skip
    names = ("prev_sample", "x0", "log_prob") if options["grpo"] else ("mean", "x0")
    return dict(zip(names, got, strict=True))


def dance_grpo_step(call: Call, **options: object) -> Named:
    got = compat.dance_grpo_step(
        call.velocity, call.latents, call.level, call.sigmas, call.indices[0], call.prev_sample,
        True, **options,
    )  # fmt: skip
    return dict(zip(("prev_sample", "x0", "log_prob"), got, strict=True))


def flow_grpo_step(call: Call) -> Named:
    got = compat.flow_grpo_step(
        call.velocity, call.latents, call.level, call.sigmas, call.indices[0], call.prev_sample,
        call.generator,
    )  # fmt: skip
    return dict(zip(("prev_sample", "x0", "log_prob"), got, strict=True))


def mix_grpo_step(call: Call, **options: object) -> Named:
    got = compat.mix_grpo_step(
        call.velocity, call.latents, call.level, call.sigmas, call.indices[0], call.prev_sample,
        call.generator, **options,
    )  # fmt: skip
    return dict(zip(("prev_sample", "x0", "log_prob", "mean", "std"), got, strict=True))


def flow_factory_step(call: Call, **options: object) -> Named:
    got = compat.flow_factory_step(
        Scheduler(call.sigmas), call.velocity, call.timesteps(), call.latents, call.prev_sample,
        generator=call.generator, noise_level=call.level, **options,
    )  # fmt: skip
    std = "diffusion" if options["dynamics_type"] == "Flow-SDE" else "std"
    return {"prev_sample": got.next_latents, "mean": got.next_latents_mean,
            "log_prob": got.log_prob, std: got.std_dev_t, "dt": got.dt}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    run: Callable[..., Named]
    dynamics: str  # of peers.step
    options: dict
    level: float
    per_row: bool = False  # a timestep a row
    float32: bool = False  # casts its inputs to float32, and draws float32 noise
    generator: bool = True  # takes one; the others draw from torch's own
    constant: bool = True  # in log_prob


PEERS: dict[str, Peer] = {
    "flow_grpo": Peer(sde_step_with_logprob, "flow", {}, 0.7, per_row=True, float32=True),
    "flow_cps": Peer(
        sde_step_with_logprob, "cps", {"sde_type": "cps"}, 0.8, per_row=True, float32=True
    ),
    "dance_grpo": Peer(flux_step, "dance", {}, 0.3, generator=False, constant=False),
    "dance_grpo_ode_mean": Peer(
        flux_step, "dance-ode", {"sde_solver": False}, 0.3, generator=False, constant=False
    ),
    "dance_grpo_constant": Peer(
        flux_step, "dance", {"log_prob_constant": True}, 0.3, generator=False
    ),
    "granular_grpo": Peer(flow_grpo_step, "flow", {}, 0.7),
    "mix_grpo": Peer(mix_grpo_step, "flow", {}, 0.7),
    "mix_grpo_noise_level": Peer(mix_grpo_step, "flow", {"noise_level": 0.9}, 0.9),
    "mix_grpo_cps": Peer(mix_grpo_step, "cps", {"sde_type": "cps"}, 0.8),
    "mix_grpo_dance": Peer(
        dance_grpo_step, "dance", {"sde_solver": True}, 0.3, generator=False, constant=False
    ),
    "mix_grpo_dance_cps": Peer(
        dance_grpo_step, "cps", {"sde_solver": True, "sde_type": "cps"}, 0.8, generator=False
    ),
    "flow_factory_flow": Peer(
        flow_factory_step, "flow", {"dynamics_type": "Flow-SDE"}, 0.7, per_row=True, float32=True
    ),
    "flow_factory_dance": Peer(
        flow_factory_step, "dance", {"dynamics_type": "Dance-SDE"}, 0.3, per_row=True, float32=True
    ),
    "flow_factory_cps": Peer(
        flow_factory_step, "cps", {"dynamics_type": "CPS"}, 0.8, per_row=True, float32=True
    ),
}


def run(name: str, call: Call) -> Named:
    return PEERS[name].run(call, **PEERS[name].options)
