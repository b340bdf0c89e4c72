"""What an update draws."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import g2rpo_kernels as gk

from ..errors import ConfigurationError
from ..schedule import noise_schedule
from .checks import distinct, expect, finite


@dataclass
class RolloutConfig:
    """What an update draws."""

    sampling: Literal["singular", "trajectories"] = "singular"
    """singular: branches leave a deterministic anchor by one stochastic step each, whose advantage
    is their reward (G2RPO). trajectories: runs that are stochastic at all sde_positions, each with
    one reward for all its steps (Flow-GRPO, DanceGRPO, MixGRPO)."""

    height: int | None = None
    """Height of the images in pixels, a multiple of 16; null: 720, and 8 for the digits."""
    width: int | None = None
    """Width of the images in pixels, a multiple of 16; null: 720, and 8 for the digits."""
    steps: int = 16
    """Steps T of the sampling schedule."""
    shift: float = 3.0
    """Shift of the schedule, sigma = shift*t / (1 + (shift-1)*t); 1 is linear."""
    guidance: float = 3.5
    """Distilled guidance scale; acts on transformers with guidance embeddings (FLUX.1-dev)."""
    eta: float = 0.7
    """Stochasticity of the one SDE step (unitless; cps: at most 1)."""
    dynamics: Literal["flow", "dance", "cps", "dpm1"] = "flow"
    """SDE of that step: flow (G2RPO, Flow-GRPO), dance, cps or dpm1 (not at position 0)."""
    sde_positions: list[int] = field(default_factory=lambda: list(range(8)))
    """Steps, 0 .. T-2, at which branches leave the anchor, or at which trajectories are
    stochastic."""
    window: int | None = None
    """Of sde_positions, how many an update uses: as many in a row, which move; null: all."""
    window_order: Literal["progressive", "random"] = "progressive"
    """Whether the window slides from the first positions to the last and begins again, or jumps."""
    window_updates: int = 1
    """Updates after which the window moves."""
    window_stride: int = 1
    """Positions that it moves by."""
    granularities: list[int] = field(default_factory=lambda: [1, 2])
    """Step sizes, in steps of the schedule, at which every branch is completed."""
    group_size: int = 12
    """Branches G per prompt and position, or trajectories per prompt, at least 2."""
    common_noise: bool = True
    """Whether a prompt's trajectories begin at one noise; branches do."""
    trained_fraction: float = 1.0
    """Of each trajectory's stochastic steps, how many are trained, drawn for each anew; in (0, 1].
    """
    precision: Literal["fp8", "bfloat16"] | None = None
    """Of the completions' forwards: fp8 (needs model.fuse) for their token linears; bfloat16 by a
    copy of a float32 transformer; null: as the update's. Anchors, and with them the importance
    ratios, never see it."""
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"
    """How the completions' forwards run: graph (needs model.fuse) replays a CUDA graph, compile
    goes through torch.compile; auto: graph on a GPU, and eager on a CPU and without model.fuse."""
    branch_batch: int = 16
    """Rows of one transformer forward; completions are packed into batches of exactly this size."""

    def validate(self) -> None:
        expect("rollout.steps", self.steps, self.steps >= 2, "at least 2 steps")
        expect("rollout.shift", self.shift, self.shift > 0 and finite(self.shift), "> 0")
        expect("rollout.guidance", self.guidance, finite(self.guidance), "a finite number")
        expect("rollout.group_size", self.group_size, self.group_size >= 2, "at least 2 branches")
        expect("rollout.branch_batch", self.branch_batch, self.branch_batch >= 1, "at least 1 row")
        distinct("rollout.sde_positions", self.sde_positions)
        distinct("rollout.granularities", self.granularities)
        self._validate_sampling()
        for k in self.sde_positions:
            expect(
                "rollout.sde_positions", self.sde_positions, 0 <= k <= self.steps - 2,
                f"positions 0 to {self.steps - 2} (rollout.steps - 2), since a branch must be "
                "completed by at least one evaluation",
            )  # fmt: skip
        for g in self.granularities:
            expect("rollout.granularities", self.granularities, g >= 1, "step sizes of at least 1")
        sigmas = noise_schedule(self.steps, self.shift)
        expect(
            "rollout.shift", self.shift, bool((sigmas.float().diff() < 0).all()),
            f"one that leaves {self.steps} steps (rollout.steps) decreasing sigmas in float32",
        )  # fmt: skip
        try:  # eta, dynamics and positions must make a step
            for k in self.sde_positions:
                gk.step_coefficients(
                    float(sigmas[k]), float(sigmas[k + 1]), self.eta, self.dynamics
                )
        except ValueError as error:
            raise ConfigurationError(
                f"rollout.eta {self.eta}, rollout.dynamics {self.dynamics!r} and position {k} of "
                f"rollout.sde_positions do not go together: {error}"
            ) from error


    def _validate_sampling(self) -> None:
        window, count = self.window, len(self.sde_positions)
        ok = window is None or 1 <= window <= count
        expect("rollout.window", window, ok, f"1 to {count} (of rollout.sde_positions), or null")
        for key in ("window_updates", "window_stride"):
            value = getattr(self, key)
            expect(f"rollout.{key}", value, value >= 1, "at least 1")
        fraction = self.trained_fraction
        expect("rollout.trained_fraction", fraction, 0 < fraction <= 1, "in (0, 1]")
        singular = self.sampling == "singular"
        for key, value, only, where in (
            ("trained_fraction", fraction, 1.0, singular),
            ("common_noise", self.common_noise, True, singular),
            ("granularities", self.granularities, [1], not singular),
            ("precision", self.precision, None, not singular),
            ("engine", self.engine, "auto", not singular),
        ):
            expected = f"{only!r} with rollout.sampling {self.sampling!r}"
            expect(f"rollout.{key}", value, not where or value == only, expected)
