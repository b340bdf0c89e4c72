"""How an update draws: which of a run's steps are stochastic, and whose reward is whose advantage.

    singular      branches that leave a deterministic anchor by one stochastic step each: the reward
                  is that step's alone (G2RPO)
    trajectories  runs that are stochastic at several steps: the reward is all of theirs (Flow-GRPO,
                  DanceGRPO, MixGRPO)

Both give the trainer the same: images-to-be to score, and `rollout.Steps` for the policy loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .completions import CompletionPlan, complete, plan_completions
from .config import Config
from .engine import CompletionEngine
from .phases import Phases
from .policy import Conditions, Model
from .rollout import Branches, Steps, branch_out
from .schedule import evaluations_per_prompt, noise_schedule
from .scoring import row_slices
from .seeds import anchor_seeds, branch_seeds, permutation, shuffled_steps, trajectory_seeds
from .trajectories import Trajectories, run_trajectories


@dataclass(frozen=True)
class Rollout:
    """What an update has drawn, for B prompts and J granularities."""

    chunks: Sequence[tuple[slice, Steps]]  # rows of a forward, and their stochastic steps
    conditions: Conditions  # of all these rows
    finished: Tensor  # [J, B * G, P, *S] what is scored; P positions with a reward of their own
    anchors: Tensor | None  # [B, *S] the deterministic runs beside them, where there are any

    def broken_prompts(self, prompts: int) -> list[int]:
        """Those with a branch or an image-to-be that is not finite."""
        log_probs = torch.cat([steps.old_log_prob for _, steps in self.chunks], dim=1)  # [K, M, G]
        sound = log_probs.isfinite().all(2).all(0).view(prompts, -1).all(1)
        sound &= self.finished.isfinite().flatten(2).all(2).all(0).view(prompts, -1).all(1)
        return (~sound).nonzero().flatten().tolist()


class Sampling(ABC):
    """One way to draw. prompts: that it draws in one update.

    branch_batch: rows of a forward that only draws. update_batch: of one that the update makes
    again, on the same rows in the same batch, so that its log-probabilities have the same bits.
    Both shrink when memory runs out."""

    update_phases: tuple[str, ...]  # those whose rows are update_batch

    def __init__(
        self, config: Config, model: Model, sigmas: Tensor, phases: Phases, prompts: int
    ) -> None:
        self.config, self.model, self.policy, self.phases = config, model, model.policy, phases
        self.sigmas = sigmas  # float32 [T + 1], on the device
        self.schedule = noise_schedule(config.rollout.steps, config.rollout.shift)  # on the host
        self.prompts, self.seed = prompts, config.train.seed
        self.group_size = config.rollout.group_size
        self._coefficients: dict[tuple[int, ...], gk.StepCoefficients] = {}
        self.keep_velocity = config.objective.ratio == "normalised"
        self.branch_batch = config.rollout.branch_batch
        self.update_batch = min(config.rollout.branch_batch, self._rows())

    @abstractmethod
    def _rows(self) -> int:
        """Rows of the update's forwards in all."""

    def evaluations(self, update: int) -> int:
        """Transformer evaluations of that update, its forwards with gradients included."""
        return evaluations_of_update(self.config, update)

    @abstractmethod
    def roll_out(
        self,
        update: int,
        prompt_ids: Sequence[int],
        conditions: Conditions,  # B rows
        on_rows: Callable[[int], None],
    ) -> Rollout:
        """All draws of an update, from its number and the prompts' ids alone."""

    @abstractmethod
    def advantages(self, values: Tensor, steps: int) -> Tensor:  # [B, P, G] -> [rows, K, G']
        """Of the rewards' groups, as the steps of the update's rows have them."""

    def positions(self, update: int) -> list[int]:
        """The stochastic steps of an update, ascending."""
        return window_positions(self.config, update)

    def coefficients(self, positions: Sequence[int]) -> gk.StepCoefficients:  # [K, 5]
        """Of these steps; kept, since windows come back to them."""
        key, rollout = tuple(positions), self.config.rollout
        if key not in self._coefficients:
            following = [k + 1 for k in positions]
            self._coefficients[key] = gk.step_coefficients(
                self.schedule[list(positions)], self.schedule[following],
                rollout.eta, rollout.dynamics, sigma_max=float(self.schedule[1]),
            ).to(self.policy.device)  # fmt: skip
        return self._coefficients[key]


class SingularSampling(Sampling):
    """G2RPO's: anchors, branches, completions at every granularity."""

    update_phases = ("anchor", "update")

    def __init__(
        self, config: Config, model: Model, sigmas: Tensor, phases: Phases, prompts: int,
        engine: CompletionEngine,
    ) -> None:  # fmt: skip
        super().__init__(config, model, sigmas, phases, prompts)
        self.engine = engine
        self._plans: dict[tuple[object, ...], CompletionPlan] = {}

    def _rows(self) -> int:
        return self.prompts

    def plan(self, positions: Sequence[int]) -> CompletionPlan:
        """Of the completions; the newest is kept, and serves every update of the same positions."""
        key = (*positions, self.branch_batch)
        if key not in self._plans:
            self._plans = {
                key: plan_completions(
                    self.schedule, positions, self.config.rollout.granularities, self.prompts,
                    self.group_size, self.branch_batch, self.policy.device,
                )
            }  # fmt: skip
        return self._plans[key]

    def roll_out(
        self,
        update: int,
        prompt_ids: Sequence[int],
        conditions: Conditions,
        on_rows: Callable[[int], None],
    ) -> Rollout:
        device, positions = self.policy.device, self.positions(update)
        coefficients = self.coefficients(positions)
        chunks: list[tuple[slice, Branches]] = []
        for rows in row_slices(len(prompt_ids), self.update_batch):
            with self.phases("anchor"):
                ids = prompt_ids[rows]
                noise = gk.normal(
                    anchor_seeds(self.seed, update, ids).to(device), self.model.latent_shape
                )
                seeds = branch_seeds(self.seed, update, ids, positions, self.group_size)
                branches = branch_out(
                    self.policy, noise, conditions[rows], self.sigmas, positions, coefficients,
                    seeds.to(device), on_rows, self.keep_velocity,
                )  # fmt: skip
                chunks.append((rows, branches))
        with self.phases("completions"), self.engine.of(conditions) as predict:
            x_next = torch.cat([branches.x_next for _, branches in chunks])
            anchors = torch.cat([branches.anchors for _, branches in chunks])
            finished, anchors = complete(predict, self.plan(positions), x_next, anchors, on_rows)
        return Rollout(chunks, conditions, finished, anchors)

    def advantages(self, values: Tensor, steps: int) -> Tensor:
        return values


class TrajectorySampling(Sampling):
    """The other methods': G runs a prompt, and one reward for each of them."""

    update_phases = ("trajectories", "update")

    def _rows(self) -> int:
        return self.prompts * self.group_size

    def roll_out(
        self,
        update: int,
        prompt_ids: Sequence[int],
        conditions: Conditions,
        on_rows: Callable[[int], None],
    ) -> Rollout:
        device, positions = self.policy.device, self.positions(update)
        coefficients = self.coefficients(positions)
        noise_seeds = trajectory_seeds(
            self.seed, update, prompt_ids, self.group_size, self.config.rollout.common_noise
        ).flatten()
        seeds = branch_seeds(self.seed, update, prompt_ids, positions, self.group_size).flatten(1)
        of = torch.arange(len(prompt_ids), device=device).repeat_interleave(self.group_size)
        everyone = conditions[of]
        trained = trained_steps(self.config, len(positions))
        chunks: list[tuple[slice, Trajectories]] = []
        with self.phases("trajectories"):
            for rows in row_slices(len(of), self.update_batch):
                runs = run_trajectories(
                    self.policy, gk.normal(noise_seeds[rows].to(device), self.model.latent_shape),
                    everyone[rows], self.sigmas, positions, coefficients, seeds[:, rows].to(device),
                    on_rows, self.keep_velocity,
                )  # fmt: skip
                if trained < len(positions):
                    chosen = shuffled_steps(seeds[:, rows], trained)
                    runs = runs.some(chosen.to(device))
                chunks.append((rows, runs))
        finished = torch.cat([runs.finished for _, runs in chunks])
        return Rollout(chunks, everyone, finished[None, :, None], None)

    def advantages(self, values: Tensor, steps: int) -> Tensor:  # [B, 1, G] -> [B * G, K, 1]
        return values.flatten()[:, None, None].expand(-1, steps, 1)


def evaluations_of_update(config: Config, update: int) -> int:
    """Transformer evaluations of an update: rows that are drawn, and rows of forwards with
    gradients (with objective.kl, the starting policy's beside them)."""
    rollout, positions = config.rollout, window_positions(config, update)
    forwards = 2 if config.objective.kl else 1
    if rollout.sampling == "trajectories":
        trained = trained_steps(config, len(positions))
        each = rollout.group_size * (rollout.steps + trained * forwards)
    else:
        drawn = evaluations_per_prompt(
            rollout.steps, positions, rollout.granularities, rollout.group_size
        )
        each = drawn + len(positions) * forwards
    return config.train.prompts_per_update * each


def trained_steps(config: Config, stochastic: int) -> int:
    """Of a trajectory's stochastic steps, how many the update sees."""
    return max(1, int(stochastic * config.rollout.trained_fraction))


def window_positions(config: Config, update: int) -> list[int]:
    """The stochastic steps of an update: rollout.sde_positions, or a window of them.

    A window moves on by rollout.window_stride every rollout.window_updates updates and begins again
    past the last place where it fits; "random" ones are at such a place by the run's seed.
    """
    rollout = config.rollout
    positions = sorted(rollout.sde_positions)
    if rollout.window is None:
        return positions
    places = range(0, len(positions) - rollout.window + 1, rollout.window_stride)
    move = (update - 1) // rollout.window_updates
    if rollout.window_order == "random":
        start = places[permutation(config.train.seed, ~move, len(places))[0]]
    else:
        start = places[move % len(places)]
    return positions[start : start + rollout.window]
