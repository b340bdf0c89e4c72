"""The update proper: policy losses with gradients, clipping, the optimizer's step.

For each SDE position one forward with gradients at x_k, a row a prompt and not one a branch; the
clipped policy loss over its branches, and a KL divergence to the starting policy where that has a
weight; then one step of AdamW, or one after every position. No gradient outlives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .config import Config
from .optimizers import make_optimizer, modulation_linears
from .policy import Conditions, FluxPolicy
from .rollout import Branches
from .weights import FullWeights, TrainedWeights


@dataclass(frozen=True)
class Improvement:
    """What one update has done."""

    losses: list[gk.PolicyLoss]  # one a forward
    grad_norm: float  # before clipping, mean over the steps
    moved: bool  # whether any step moved the weights
    finite: bool  # whether every gradient was; one that is not moves nothing
    broken: list[int]  # rows (prompts) whose log-probabilities are not finite
    broken_parameters: list[str]  # whose gradients are not, where the optimizer names them


class Improver:
    """Owns the optimizer.

    positions, sigmas, coefficients: the SDE positions, ascending, and a row of coefficients each.
    on_evaluations(rows): progress.
    """

    def __init__(
        self,
        config: Config,
        policy: FluxPolicy,
        weights: TrainedWeights,
        positions: Sequence[int],  # K
        sigmas: Tensor,  # float32 [T + 1]
        coefficients: gk.StepCoefficients,  # table [K, 5]
        on_evaluations: Callable[[int], None],
    ) -> None:
        self.policy, self.weights, self.objective = policy, weights, config.objective
        self.positions, self.sigmas, self.coefficients = positions, sigmas, coefficients
        self.on_evaluations = on_evaluations
        self.parameters = list(weights.parameters.values())
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.optimizer = make_optimizer(config.optimizer, weights.parameters, config.train.seed)
        # Takes gradients as factors, and a scale that clips them as it steps.
        self.eight_bit = config.optimizer.name == "adamw8bit"
        self.offloads = config.optimizer.offload
        if self.eight_bit and isinstance(weights, FullWeights):
            gk.factor_gradients(modulation_linears(policy.transformer))
        self.broken_parameters: dict[str, None] = {}  # of this update, in their order
        self.stepping = False  # a step has begun: the weights may be no update's

    def improve(
        self,
        chunks: Sequence[tuple[slice, Branches]],  # rows of the prompts, and their branches
        conditions: Conditions,  # B rows
        advantages: Tensor,  # [B, K, G]
    ) -> Improvement:
        per_position = self.objective.stepping == "per_position"
        losses: list[gk.PolicyLoss] = []
        norms: list[float] = []
        rows_of: list[slice] = []
        self.broken_parameters = {}
        references = self._reference_velocities(chunks, conditions)
        self.optimizer.zero_grad(set_to_none=True)
        for index in range(len(self.positions)):
            for (rows, branches), reference in zip(chunks, references[index], strict=True):
                out = self._loss(
                    index, branches, conditions[rows], advantages[rows, index], reference
                )
                # From the mean over this chunk's rows to its share of the mean over all rows and,
                # when positions are accumulated, over positions.
                share = branches.latents.shape[1] / len(conditions)
                (out.loss * (share if per_position else share / len(self.positions))).backward()
                losses.append(out._replace(loss=out.loss.detach()))
                rows_of.append(rows)
            if per_position:
                norms.append(self._step())
        if not per_position:
            norms.append(self._step())
        finite = all(math.isfinite(norm) for norm in norms)
        return Improvement(
            losses=losses,
            grad_norm=sum(norms) / len(norms),
            moved=any(0 < norm < math.inf for norm in norms),
            finite=finite,
            broken=[] if finite else _broken_rows(losses, rows_of),
            broken_parameters=list(self.broken_parameters),
        )

    def _reference_velocities(
        self, chunks: Sequence[tuple[slice, Branches]], conditions: Conditions
    ) -> list[list[Tensor | None]]:  # [K][chunk], each [rows, *S]
        """Of the starting policy, which is swapped in once for all of them."""
        if not self.objective.kl:
            return [[None] * len(chunks) for _ in self.positions]
        with self.weights.starting_policy():
            return [
                [
                    self.policy.predict(*self._at(index, branches), conditions[rows])
                    for rows, branches in chunks
                ]
                for index in range(len(self.positions))
            ]

    def _at(self, index: int, branches: Branches) -> tuple[Tensor, Tensor]:
        """x_k and its sigma, a row a prompt."""
        latents = branches.latents[index]
        self.on_evaluations(len(latents))
        return latents, self.sigmas[self.positions[index]].expand(len(latents))

    def _loss(
        self,
        index: int,
        branches: Branches,
        conditions: Conditions,
        advantages: Tensor,  # [rows, G]
        reference: Tensor | None,  # [rows, *S]
    ) -> gk.PolicyLoss:
        latents, sigma = self._at(index, branches)
        return gk.policy_loss(
            self.policy.velocity(latents, sigma, conditions),
            latents,
            branches.x_next[:, :, index],
            branches.old_log_prob[index],
            advantages,
            gk.StepCoefficients(
                self.coefficients.table[index : index + 1], self.coefficients.dynamics
            ),
            clip_range=self.objective.clip_range,
            advantage_clip=self.objective.advantage_clip,
            reference_velocity=reference,
            kl_weight=self.objective.kl,
        )

    def _step(self) -> float:
        """Clip and step. A gradient that is zero or not finite moves nothing: it says nothing."""
        norm = gk.total_grad_norm(self.parameters)
        value = float(norm)  # the one time that the host waits
        if self.offloads and value != 0:
            self.optimizer.restore()
        if 0 < value < math.inf:
            if self.eight_bit:  # clips as it steps
                scale = min(1.0, self.max_grad_norm / (value + 1e-6))
                self.stepping = True
                self.optimizer.step(grad_scale=scale)
            else:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
                self.stepping = True
                self.optimizer.step()
        elif value != 0 and self.eight_bit:  # skipped for such a scale, but counted and named
            self.optimizer.step(grad_scale=value)
            named = [n for n in self.optimizer.last_non_finite if n in self.weights.parameters]
            self.broken_parameters.update(dict.fromkeys(named))
        self.optimizer.zero_grad(set_to_none=True)
        return value


def _broken_rows(losses: Sequence[gk.PolicyLoss], rows_of: Sequence[slice]) -> list[int]:
    broken: set[int] = set()
    for out, rows in zip(losses, rows_of, strict=True):
        sound = out.log_prob.isfinite().all(1).tolist()
        broken.update(rows.start + i for i, ok in enumerate(sound) if not ok)
    return sorted(broken)
