"""The G2RPO loop: roll out, score, form advantages, update.

One update, in order (arXiv 2510.01982):

    anchor       one deterministic run a prompt; x_k and v_k are kept at the SDE positions k
    branches     at each k one stochastic step fans out into G branches, old_log_prob with it
    completions  every branch to an image at every granularity, sharing what paths share
    rewards      decode, score; normalise over the G branches, sum over granularities and models
    update       one forward with gradients at each x_k, clipped policy loss over its G branches

The anchor's velocities come from the same forward on the same rows in the same batch as those of
the update, so under `stepping: accumulate` the importance ratio is exactly 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import g2rpo_kernels as gk

from .completions import complete, plan_completions
from .config import Config
from .data import PromptSampler
from .engine import CompletionEngine
from .errors import ConfigurationError
from .improve import Improver
from .memory import peak_memory_bytes, refuse, within_memory
from .objective import Advantages, integrate_advantages, summarise_losses
from .phases import Phases
from .policy import Conditions, Model
from .rewards import Reward
from .rollout import Branches, branch_out, broken_prompts
from .schedule import evaluations_per_prompt, noise_schedule
from .scoring import (
    evaluation_row,
    row_slices,
    sample_policy,
    score_images,
    score_rollout,
)
from .seeds import anchor_seeds, branch_seeds
from .weights import MovingAverage, assign, make_weights

# Attributes of the trainer that a checkpoint keeps as they are.
STATE = (
    "updates", "evaluations", "skipped_updates", "skipped_in_a_row", "seconds", "row",
    "branch_batch", "anchor_batch",
)  # fmt: skip


class Interrupted(Exception):
    """An update was abandoned on request; weights and optimizer are as they were before it."""


class Trainer:
    """Changes the policy's weights, update by update; writes nothing to disk.

    config: validated. model: see `policy.Model`. rewards: at least one that is trained.
    on_phase(name), on_evaluations(rows): progress. on_message(text): what a person should know.
    should_stop(): asked between batches of the rollout; True abandons it with `Interrupted`.
    """

    def __init__(
        self,
        config: Config,
        model: Model,
        rewards: Sequence[Reward],
        *,
        on_phase: Callable[[str], None] = lambda name: None,
        on_evaluations: Callable[[int], None] = lambda rows: None,
        on_message: Callable[[str], None] = lambda text: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.model, self.policy = config, model, model.policy
        self.rewards = list(rewards)
        self.trained = [reward for reward in rewards if not reward.heldout]
        self.on_phase, self.on_evaluations, self.on_message = on_phase, on_evaluations, on_message
        self.should_stop = should_stop
        rollout, train, device = config.rollout, config.train, self.policy.device
        self.schedule = noise_schedule(rollout.steps, rollout.shift)  # float64, on the host
        self.sigmas = self.schedule.float().to(device)
        self.positions = sorted(rollout.sde_positions)
        self.coefficients = gk.step_coefficients(  # a row a position
            self.schedule[self.positions], self.schedule[[k + 1 for k in self.positions]],
            rollout.eta, rollout.dynamics, sigma_max=float(self.schedule[1]),
        ).to(device)  # fmt: skip
        self.sampler = PromptSampler(model.prompts, train.prompts_per_update, train.seed)
        asked = model.evaluation_prompts
        self.evaluation_prompts = [asked[i % len(asked)] for i in range(train.evaluation_samples)]
        # Rows of a completions' forward, and of the anchor's and so of the update's: both shrink
        # when memory runs out.
        self.branch_batch = rollout.branch_batch
        self.anchor_batch = min(rollout.branch_batch, train.prompts_per_update)
        self._plan_completions()
        if config.model.fuse:
            gk.fuse_flux(self.policy.transformer)
        if config.model.gradient_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing()
        self.weights = make_weights(
            self.policy.transformer, config.model.lora, train.seed, bool(config.objective.kl)
        )
        self.engine = CompletionEngine(
            config, self.policy, self.sigmas, lambda text: self.on_message(text)
        )
        self.average = None
        if train.ema is not None:
            self.average = MovingAverage(self.weights.parameters, train.ema)
        self.improver = Improver(
            config, self.policy, self.weights, self.positions, self.sigmas, self.coefficients,
            lambda rows: self.on_evaluations(rows),
        )  # fmt: skip
        # Transformer evaluations of one update, forwards with gradients included, and those of the
        # starting policy.
        forwards = len(self.positions) * (2 if config.objective.kl else 1)
        self.evaluations_per_update = train.prompts_per_update * (
            forwards
            + evaluations_per_prompt(
                rollout.steps, self.positions, rollout.granularities, rollout.group_size
            )
        )
        self.updates = self.evaluations = self.skipped_updates = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.row: dict[str, Any] = {}  # metrics of the newest update
        self._counting = False
        self.phases = Phases(device, lambda name: self.on_phase(name))
        for reward in self.rewards:
            reward.rest()

    @property
    def midway(self) -> bool:
        """Whether weights and counters are those of no complete update."""
        return self.improver.stepping or self._counting

    def update(self) -> dict[str, Any]:
        """One update of the policy. Returns its metrics row.

        Where memory runs out before the weights have moved, the batches become smaller and the
        update is made again. A loss or gradient that is not finite moves nothing and is counted.

        Raises Interrupted when asked to stop, TrainingError when every reward failed or memory does
        not suffice; either way weights and optimizer are untouched.
        """
        return within_memory(self._update, self._make_room)

    def evaluate(self, start: Tensor | None = None) -> tuple[dict[str, Any], Tensor, Tensor]:
        """The fixed evaluation, an image of each of the M `evaluation_prompts`: metrics keys,
        images [M, C, H, W] and scores, float64 [R, M].

        start: scores of the starting policy, for win rates. Of the weights' moving average, if one
        is kept. Evaluations made here are not training and are not counted.
        """
        return within_memory(partial(self._evaluate, start), self._make_room)

    def state_dict(self) -> dict[str, Any]:
        """All that an undisturbed run would go on with, the weights and their average apart."""
        state = {
            "optimizer": self.improver.optimizer.state_dict(),
            "prompts": self.sampler.prompts,
            "evaluation_prompts": self.evaluation_prompts,
            **{name: getattr(self, name) for name in STATE},
        }
        if hasattr(self.model, "state_dict"):
            state["model"] = self.model.state_dict()
        return state

    def load_state_dict(
        self,
        state: dict[str, Any],
        weights: dict[str, Tensor],  # by parameter
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Counterpart of `state_dict`, and of the weights and their average; strict.

        Raises ConfigurationError for other prompts: their ids decide what every update draws.
        """
        if state["prompts"] != self.sampler.prompts:
            raise ConfigurationError(
                f"data.prompts is {self.config.data.prompts!r}, which holds "
                f"{len(self.sampler.prompts)} prompts; expected the {len(state['prompts'])} that "
                "the run was started with, in their order"
            )
        evaluated = state.get("evaluation_prompts", self.evaluation_prompts)  # older ones lack it
        if evaluated != self.evaluation_prompts:
            raise ConfigurationError(
                f"data.evaluation_prompts is {self.config.data.evaluation_prompts!r}, whose "
                "prompts are others than those that the run was started with; expected the same, "
                "in their order"
            )
        assign(self.weights.parameters, weights)
        if self.average is not None:
            self.average.load(average or {})
        self.improver.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])
        if hasattr(self.model, "load_state_dict"):
            self.model.load_state_dict(state["model"])
        self._plan_completions()

    # The parts of an update ---------------------------------------------------------------------

    def _update(self) -> dict[str, Any]:
        started, self.phases.seconds = time.perf_counter(), {}
        number = self.updates + 1
        prompt_ids = self.sampler.ids(number)
        prompts = [self.sampler.prompts[i] for i in prompt_ids]
        with self.phases("prompts"):
            conditions = self.model.embed(prompts)
        chunks, finished, anchors = self.roll_out(number, prompt_ids, conditions)
        broken = broken_prompts(chunks, finished)
        row: dict[str, Any] = {"lr": self.config.optimizer.lr}
        if len(broken) == len(prompts):  # nothing to score: the policy itself has gone wrong
            row |= {"loss": math.nan, "grad_norm": math.nan}
            self._skip(number, [prompts[i] for i in broken], "the rollout")
        else:
            scored = self._score(prompts, finished, anchors)
            del finished, anchors  # gigabytes, which the update has no room for
            row |= self._learn(number, prompts, conditions, chunks, *scored)
        self._counting = True
        seconds = time.perf_counter() - started
        self.updates = number
        self.evaluations += self.evaluations_per_update
        self.seconds += seconds
        self.row = {
            "update": number,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "evaluations_per_second": self.evaluations_per_update / seconds,
            **row,
            "skipped_updates": self.skipped_updates,
            **{f"seconds/{name}": seconds for name, seconds in self.phases.seconds.items()},
            "peak_memory_bytes": peak_memory_bytes(self.policy.device),
        }
        self._counting = self.improver.stepping = False
        return self.row

    @torch.no_grad()
    def roll_out(
        self, number: int, prompt_ids: Sequence[int], conditions: Conditions
    ) -> tuple[list[tuple[slice, Branches]], Tensor, Tensor]:
        """Anchors and branches of update `number`, then the completions of both.

        Returns the branches by chunk of prompts, [J, B * G, K, *S] and [B, *S].
        """
        seed, device = self.config.train.seed, self.policy.device
        self._offload()
        chunks = []
        for rows in row_slices(len(prompt_ids), self.anchor_batch):
            with self.phases("anchor"):
                ids = prompt_ids[rows]
                noise = gk.normal(
                    anchor_seeds(seed, number, ids).to(device), self.model.latent_shape
                )
                seeds = branch_seeds(
                    seed, number, ids, self.positions, self.config.rollout.group_size
                ).to(device)
                branches = branch_out(
                    self.policy, noise, conditions[rows], self.sigmas,
                    self.positions, self.coefficients, seeds, self._progress,
                )  # fmt: skip
                chunks.append((rows, branches))
        with self.phases("completions"), self.engine.of(conditions) as predict:
            x_next = torch.cat([branches.x_next for _, branches in chunks])
            anchors = torch.cat([branches.anchors for _, branches in chunks])
            finished, anchors = complete(predict, self.plan, x_next, anchors, self._progress)
        return chunks, finished, anchors

    def _score(
        self,
        prompts: Sequence[str],
        finished: Tensor,  # [J, B * G, K, *S]
        anchors: Tensor,  # [B, *S]
    ) -> tuple[Advantages, dict[str, float]]:
        """Decode, score, form advantages. Returns them and metrics keys."""
        with self.phases("rewards"), torch.no_grad(), self.scoring():
            rewards, row = score_rollout(
                self.model, finished, anchors, prompts, self.trained, self.branch_batch
            )
            weights = [r.weight for r in self.trained]
            return integrate_advantages(rewards, self.config.rollout.group_size, weights), row

    def _learn(
        self,
        number: int,
        prompts: Sequence[str],
        conditions: Conditions,
        chunks: Sequence[tuple[slice, Branches]],
        advantages: Advantages,
        reward_row: dict[str, float],
    ) -> dict[str, Any]:
        """Improve the policy. Returns metrics keys."""
        with self.phases("update"):
            result = self.improver.improve(chunks, conditions, advantages.values)
            if result.moved:
                self.skipped_in_a_row = 0
                if self.average is not None:
                    self.average.update()
            elif result.finite:
                self.skipped_updates += 1  # no group had spread: nothing to learn, nothing wrong
        if not result.finite:
            named = [prompts[i] for i in result.broken or range(len(prompts))]
            of = _of(result.broken_parameters)
            if result.moved:  # some positions of per_position have stepped
                text = _not_finite(named, f"a gradient{of}")
                self.on_message(f"Update {number}: {text}, left out")
            else:
                self._skip(number, named, "the loss" if result.broken else f"the gradient{of}")
        return {
            **summarise_losses(result.losses, with_kl=bool(self.config.objective.kl)),
            "grad_norm": result.grad_norm,
            "advantage_std": advantages.std,
            "reward_groups": advantages.groups,
            "zero_spread_groups": advantages.zero_spread_groups,
            "failed_groups": advantages.failed_groups,
            **reward_row,
        }

    def _skip(self, number: int, prompts: Sequence[str], what: str) -> None:
        self.skipped_updates += 1
        self.skipped_in_a_row += 1
        self.on_message(f"Update {number} is skipped: {_not_finite(prompts, what)}")

    def _evaluate(self, start: Tensor | None) -> tuple[dict[str, Any], Tensor, Tensor]:
        self.phases.seconds = {}
        self._offload()
        prompts = self.evaluation_prompts
        average = self.average.applied() if self.average is not None else nullcontext()
        with self.phases("evaluation"), average, self.scoring():
            images = sample_policy(self.model, prompts, self.sigmas, self.branch_batch)
            scores = score_images(images, prompts, self.rewards, self.branch_batch)
            row = evaluation_row(images, prompts, self.rewards, scores, start)
        return {**row, "seconds/evaluation": self.phases.seconds["evaluation"]}, images, scores

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """What scores in here leaves no weights of a reward on the device that are to be in host
        memory in between, not even where it fails."""
        try:
            yield
        finally:
            for reward in self.rewards:
                reward.rest()

    def _offload(self) -> None:
        """Make room for a rollout; the optimizer's step brings back what it needs."""
        if self.config.optimizer.offload:
            with self.phases("offload"):
                self.improver.optimizer.offload()

    # Memory and time ----------------------------------------------------------------------------

    def _plan_completions(self) -> None:
        rollout, train = self.config.rollout, self.config.train
        self.plan = plan_completions(
            self.schedule, self.positions, rollout.granularities, train.prompts_per_update,
            rollout.group_size, self.branch_batch, self.policy.device,
        )  # fmt: skip

    def _make_room(self, reason: str) -> None:
        """Halve the batch of the phase that ran out of memory. Raises TrainingError at one row."""
        self.improver.optimizer.zero_grad(set_to_none=True)
        phase = self.phases.name
        which = "anchor_batch" if phase in ("anchor", "update") else "branch_batch"
        rows = getattr(self, which)
        if self.midway or rows == 1:
            refuse(phase, reason)
        setattr(self, which, rows // 2)
        self._plan_completions()
        self.on_message(
            f"Out of memory in the phase {phase!r}: from here on {rows // 2} rows a forward in it, "
            f"not {rows} ({reason})"
        )

    def _progress(self, rows: int) -> None:
        self.on_evaluations(rows)
        if self.should_stop():
            raise Interrupted


def _of(parameters: Sequence[str]) -> str:
    """' of proj_out.weight, and 3 more'"""
    if not parameters:
        return ""
    more = f", and {len(parameters) - 1} more" if len(parameters) > 1 else ""
    return f" of {parameters[0]}{more}"


def _not_finite(prompts: Sequence[str], what: str) -> str:
    """'the loss is not finite (prompt 'a cat', and 3 more)'"""
    more = f", and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return f"{what} is not finite (prompt {prompts[0]!r}{more})"
