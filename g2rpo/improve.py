"""The update proper: policy losses with gradients, clipping, the optimizer's step.

For each stochastic step one forward with gradients at x_k, a row an anchor and not one a branch;
the clipped policy loss over its branches, and a KL divergence to the starting policy where that has
a weight; then one step of AdamW, or one after every position. No gradient outlives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .config import Config
from .distributed.layout import Layout
from .distributed.shards import local
from .optimizers import make_optimizer, modulation_linears
from .policy import Conditions, FluxPolicy
from .rollout import Step, Steps
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

    on_evaluations(rows): progress.
    """

    def __init__(
        self,
        config: Config,
        policy: FluxPolicy,
        weights: TrainedWeights,
        layout: Layout,
        on_evaluations: Callable[[int], None],
    ) -> None:
        self.policy, self.weights, self.objective = policy, weights, config.objective
        self.layout = layout
        self.on_evaluations = on_evaluations
        self.parameters = list(weights.parameters.values())
        self.max_grad_norm = config.optimizer.max_grad_norm
        self.optimizer = make_optimizer(
            config.optimizer, weights.parameters, config.train.seed, layout.sharded
        )
        # Takes gradients as factors, and a scale that clips them as it steps.
        self.eight_bit = config.optimizer.name == "adamw8bit"
        self.offloads = config.optimizer.offload
        if self.eight_bit and isinstance(weights, FullWeights) and not layout.sharded:
            gk.factor_gradients(modulation_linears(policy.transformer))
        self.broken_parameters: dict[str, None] = {}  # of this update, in their order
        self.stepping = False  # a step has begun: the weights may be no update's

    def improve(
        self,
        chunks: Sequence[tuple[slice, Steps]],  # rows of a forward, and their K steps
        conditions: Conditions,  # a row each
        advantages: Tensor,  # [rows, K, G]
    ) -> Improvement:
        per_position = self.objective.stepping == "per_position"
        losses: list[gk.PolicyLoss] = []
        norms: list[float] = []
        rows_of: list[slice] = []
        self.broken_parameters = {}
        references = self._reference_velocities(chunks, conditions)
        self.optimizer.zero_grad(set_to_none=True)
        positions = advantages.shape[1]
        for index in range(positions):
            for (rows, steps), reference in zip(chunks, references[index], strict=True):
                step = steps.step(index)
                out = self._loss(step, conditions[rows], advantages[rows, index], reference)
                # From the mean over this chunk's rows to its share of the mean over all ranks' rows
                # and, when positions are accumulated, over positions.
                share = len(step.latents) / (len(conditions) * self.layout.count)
                last_of_step = per_position or index == positions - 1
                self.layout.before_backward(last_of_step and rows is chunks[-1][0])
                (out.loss * (share if per_position else share / positions)).backward()
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
        self, chunks: Sequence[tuple[slice, Steps]], conditions: Conditions
    ) -> list[list[Tensor | None]]:  # [K][chunk], each [rows, *S]
        """Of the starting policy, which is swapped in once for all of them."""
        positions = range(len(chunks[0][1]))
        if not self.objective.kl:
            return [[None] * len(chunks) for _ in positions]
        found: list[list[Tensor | None]] = [[] for _ in positions]
        with self.weights.starting_policy():
            for index in positions:
                for rows, steps in chunks:
                    step = steps.step(index)
                    self.on_evaluations(len(step.latents))
                    found[index].append(
                        self.policy.predict(step.latents, step.sigmas, conditions[rows])
                    )
        return found

    def _loss(
        self,
        step: Step,
        conditions: Conditions,
        advantages: Tensor,  # [rows, G]
        reference: Tensor | None,  # [rows, *S]
    ) -> gk.PolicyLoss:
        self.on_evaluations(len(step.latents))
        return gk.policy_loss(
            self.policy.velocity(step.latents, step.sigmas, conditions),
            step.latents,
            step.x_next,
            step.old_log_prob,
            advantages,
            step.coefficients,
            clip_range=self.objective.clip_range,
            advantage_clip=self.objective.advantage_clip,
            reference_velocity=reference,
            kl_weight=self.objective.kl,
            old_velocity=step.old_velocity,
        )

    def _step(self) -> float:
        """Clip and step. A gradient that is zero or not finite moves nothing: it says nothing."""
        self.layout.reduce(self.parameters)
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
                # As torch's clip_grads_with_norm_, of this rank's parts.
                scale = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
                gradients = [p.grad for p in self.parameters if p.grad is not None]
                torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
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
