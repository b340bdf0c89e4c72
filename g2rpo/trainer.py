"""The G2RPO loop: roll out, score, form advantages, update.

One update, in order (arXiv 2510.01982):

    anchor       one deterministic run a prompt; x_k and v_k are kept at the SDE positions k
    branches     at each k one stochastic step fans out into G branches, old_log_prob with it
    completions  every branch to an image at every granularity, sharing what paths share
    rewards      decode, score; normalise over the G branches, sum over granularities and models
    update       one forward with gradients at each x_k, clipped policy loss over its G branches

The anchor's velocities come from the same forward on the same rows in the same batch as those of
the update, so under `stepping: accumulate` the importance ratio is exactly 1. `sampling` has this
way to draw and that of the other methods, whose runs are stochastic at many steps.

Several ranks share an update's prompts: each rolls out and scores its own, all know all scores, and
what a rank's own prompts teach adds up to one gradient.
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

from . import trainer_state
from .config import Config
from .data import PromptSampler
from .distributed import ALONE, Ranks
from .distributed.layout import make_layout
from .engine import CompletionEngine
from .errors import ConfigurationError
from .improve import Improver
from .memory import peak_memory_bytes, refuse, within_memory
from .objective import Advantages, integrate_advantages, loss_table, summarise_losses
from .phases import Phases
from .policy import Conditions, Model
from .rewards import Reward
from .rollout import Steps
from .sampling import Rollout, SingularSampling, TrajectorySampling
from .schedule import noise_schedule
from .scoring import RolloutScores, evaluate_policy, score_rollout
from .weights import MovingAverage, assign, make_weights


class Interrupted(Exception):
    """An update was abandoned on request; weights and optimizer are as they were before it."""


class Trainer:
    """Changes the policy's weights, update by update; writes nothing to disk.

    config: validated. model: see `policy.Model`. rewards: at least one that is trained.
    on_phase(name), on_evaluations(rows): progress. on_message(text): what a person should know.
    should_stop(): asked between batches of the rollout; True abandons it with `Interrupted`.
    ranks: the processes that share this run. Each has a Trainer, and calls its methods as they do.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.config, self.model, self.policy, self.ranks = config, model, model.policy, ranks
        self.rewards = list(rewards)
        self.trained = [reward for reward in rewards if not reward.heldout]
        self.on_phase, self.on_evaluations, self.on_message = on_phase, on_evaluations, on_message
        self.should_stop = should_stop
        rollout, train, device = config.rollout, config.train, self.policy.device
        self.sigmas = noise_schedule(rollout.steps, rollout.shift).float().to(device)
        self.sampler = PromptSampler(model.prompts, train.prompts_per_update, train.seed)
        asked = model.evaluation_prompts
        self.evaluation_prompts = [asked[i % len(asked)] for i in range(train.evaluation_samples)]
        if config.model.fuse:
            gk.fuse_flux(self.policy.transformer)
        if config.model.gradient_checkpointing:
            self.policy.transformer.enable_gradient_checkpointing()
        self.weights = make_weights(
            self.policy.transformer, config.model.lora, train.seed, bool(config.objective.kl)
        )
        self.layout, replica = make_layout(config, self.policy, self.weights, ranks)
        self.phases = Phases(device, self._enter)
        if train.prompts_per_update % ranks.count:
            raise ConfigurationError(
                f"train.prompts_per_update is {train.prompts_per_update}; expected a multiple of "
                f"the {ranks.count} ranks, which share them equally"
            )
        prompts = train.prompts_per_update // ranks.count
        shared = config, model, self.sigmas, self.phases, prompts
        if rollout.sampling == "trajectories":
            self.sampling = TrajectorySampling(*shared)
        else:
            engine = CompletionEngine(
                config, self.policy, self.sigmas, lambda text: self.on_message(text), replica
            )
            self.sampling = SingularSampling(*shared, engine)
        self.average = None
        if train.ema is not None:
            self.average = MovingAverage(self.weights.parameters, train.ema)
        self.improver = Improver(
            config, self.policy, self.weights, self.layout, lambda rows: self._count(rows)
        )
        self.updates = self.evaluations = self.skipped_updates = self.skipped_in_a_row = 0
        self.seconds = 0.0
        self.row: dict[str, Any] = {}  # metrics of the newest update
        self._counting = False
        for reward in self.rewards:
            reward.rest()

    @property
    def evaluations_per_update(self) -> int:
        """Transformer evaluations of the next update, forwards with gradients included."""
        return self.sampling.evaluations(self.updates + 1)

    @property
    def midway(self) -> bool:
        """Whether weights and counters are those of no complete update."""
        return self.improver.stepping or self._counting

    def update(self) -> dict[str, Any]:
        """One update of the policy. Returns its metrics row.

        Where memory runs out before the weights have moved, the batches become smaller and the
        update is made again; of several ranks with whole weights, in their draws alone. A loss or
        gradient that is not finite moves nothing and is counted.

        Raises Interrupted when asked to stop, TrainingError when every reward failed or memory does
        not suffice; either way weights and optimizer are untouched.
        """
        return within_memory(self._update, self._make_room)

    def evaluate(
        self, start: Tensor | None = None
    ) -> tuple[dict[str, Any], Tensor | None, Tensor]:
        """The fixed evaluation, an image of each of the M `evaluation_prompts`: metrics keys,
        images [M, C, H, W] and scores, float64 [R, M]. Keys and images are the lead's alone.

        start: scores of the starting policy, for win rates. Of the weights' moving average, if one
        is kept. Evaluations made here are not training and are not counted.
        """
        return within_memory(partial(self._evaluate, start), self._make_room)

    def state_dict(self) -> dict[str, Any]:
        """All that an undisturbed run would go on with, the weights and their average apart."""
        return trainer_state.collect(self)

    def load_state_dict(
        self,
        state: dict[str, Any],
        weights: dict[str, Tensor],  # by parameter
        average: dict[str, Tensor] | None = None,
    ) -> None:
        """Counterpart of `state_dict`, and of the weights and their average; strict.

        Raises ConfigurationError for other prompts: their ids decide what every update draws.
        """
        trainer_state.check(self, state)
        assign(self.weights.parameters, weights)
        if self.average is not None:
            self.average.load(average or {})
        trainer_state.restore(self, state)

    # The parts of an update ---------------------------------------------------------------------

    def _update(self) -> dict[str, Any]:
        started, self.phases.seconds = time.perf_counter(), {}
        number = self.updates + 1
        every_id = self.sampler.ids(number)
        everyone = [self.sampler.prompts[i] for i in every_id]
        prompt_ids, prompts = self.ranks.part(every_id), self.ranks.part(everyone)
        evaluations = self.evaluations_per_update
        drawn = self._draw(number, prompt_ids, prompts)
        with self.phases("waiting") if self.ranks.count > 1 else nullcontext():
            if self.ranks.any(drawn is None or (self.layout.sharded and self.should_stop())):
                raise Interrupted
            rollout, scores, broken = drawn
            broken = sum(self.ranks.gather(broken))
            scores = scores.of_all(self.ranks)
        row: dict[str, Any] = {"lr": self.config.optimizer.lr}
        if broken == len(everyone):  # the policy itself has gone wrong
            row |= {"loss": math.nan, "grad_norm": math.nan}
            self._skip(number, everyone, "the rollout")
        else:
            advantages = self._advantages(scores.images)
            chunks, conditions = rollout.chunks, rollout.conditions
            del rollout, drawn  # gigabytes of images-to-be, which the update has no room for
            row |= self._learn(number, prompts, conditions, chunks, advantages)
            row |= scores.row(self.trained)
        self._counting = True
        seconds = time.perf_counter() - started
        self.updates = number
        self.evaluations += evaluations
        self.seconds += seconds
        self.row = {
            "update": number,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
            "evaluations_per_second": evaluations / seconds,
            **row,
            "skipped_updates": self.skipped_updates,
            **self._largest(self.phases.seconds),
        }
        self._counting = self.improver.stepping = False
        return self.row

    def _draw(
        self, number: int, prompt_ids: Sequence[int], prompts: Sequence[str]
    ) -> tuple[Rollout, RolloutScores, int] | None:
        """This rank's share of an update's draws, their scores, and how many of its prompts are
        broken; None where it was asked to stop."""
        try:
            with self.phases("prompts"):
                conditions = self.model.embed(prompts)
            rollout = self.roll_out(number, prompt_ids, conditions)
            broken = len(rollout.broken_prompts(len(prompts)))
            with self.phases("rewards"), torch.no_grad(), self.scoring():
                scores = score_rollout(
                    self.model, rollout.finished, rollout.anchors, prompts, self.trained,
                    self.sampling.branch_batch,
                )  # fmt: skip
            return rollout, scores, broken
        except Interrupted:
            return None

    def _largest(self, seconds: dict[str, float]) -> dict[str, float]:
        """Of the ranks' phases and peaks the largest, as metrics keys: all wait for that one."""
        mine = {f"seconds/{name}": value for name, value in seconds.items()}
        mine["peak_memory_bytes"] = peak_memory_bytes(self.policy.device)
        found = self.ranks.gather(mine)
        return {key: max(each[key] for each in found) for key in mine}

    @torch.no_grad()
    def roll_out(
        self, number: int, prompt_ids: Sequence[int], conditions: Conditions
    ) -> Rollout:
        """The draws of update `number`."""
        self._offload()
        return self.sampling.roll_out(number, prompt_ids, conditions, self._progress)

    def _advantages(self, rewards: Tensor) -> Advantages:  # [R, J, B * G, K]
        weights = [r.weight for r in self.trained]
        group, std = self.config.rollout.group_size, self.config.objective.advantage_std
        return integrate_advantages(rewards, group, weights, std)

    def _learn(
        self,
        number: int,
        prompts: Sequence[str],  # of this rank
        conditions: Conditions,
        chunks: Sequence[tuple[slice, Steps]],
        advantages: Advantages,  # of all ranks
    ) -> dict[str, Any]:
        """Improve the policy. Returns metrics keys."""
        with self.phases("update"):
            mine = self.ranks.part(advantages.values)
            values = self.sampling.advantages(mine, len(chunks[0][1]))
            result = self.improver.improve(chunks, conditions, values)
            if result.moved:
                self.skipped_in_a_row = 0
                if self.average is not None:
                    self.average.update()
            elif result.finite:
                self.skipped_updates += 1  # no group had spread: nothing to learn, nothing wrong
        if not result.finite:
            each = len(conditions) // len(prompts)  # rows of a prompt
            rows = dict.fromkeys(i // each for i in result.broken)
            told = self.ranks.gather(([prompts[i] for i in rows], prompts))
            broken = [prompt for some, _ in told for prompt in some]
            named = broken or [prompt for _, every in told for prompt in every]
            of = _of(result.broken_parameters)
            if result.moved:  # some positions of per_position have stepped
                text = _not_finite(named, f"a gradient{of}")
                self._tell(f"Update {number}: {text}, left out")
            else:
                self._skip(number, named, "the loss" if broken else f"the gradient{of}")
        return {
            **summarise_losses(
                torch.cat(self.ranks.gather(loss_table(result.losses))),
                with_kl=bool(self.config.objective.kl),
            ),
            "grad_norm": result.grad_norm,
            "advantage_std": advantages.std,
            "reward_groups": advantages.groups,
            "zero_spread_groups": advantages.zero_spread_groups,
            "failed_groups": advantages.failed_groups,
        }

    def _skip(self, number: int, prompts: Sequence[str], what: str) -> None:
        self.skipped_updates += 1
        self.skipped_in_a_row += 1
        self._tell(f"Update {number} is skipped: {_not_finite(prompts, what)}")

    def _tell(self, text: str) -> None:
        """What all ranks know."""
        if self.ranks.lead:
            self.on_message(text)

    def _evaluate(self, start: Tensor | None) -> tuple[dict[str, Any], Tensor | None, Tensor]:
        self.phases.seconds = {}
        self._offload()
        average = self.average.applied() if self.average is not None else nullcontext()
        with self.phases("evaluation"), average, self.scoring():
            row, images, scores = evaluate_policy(
                self.model, self.evaluation_prompts, self.sigmas, self.rewards,
                self.sampling.branch_batch, self.ranks, start,
            )  # fmt: skip
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

    def _make_room(self, reason: str) -> None:
        """Halve the batch of the phase that ran out of memory. Raises TrainingError at one row."""
        self.improver.optimizer.zero_grad(set_to_none=True)
        phase, sampling = self.phases.name, self.sampling
        if self.ranks.count > 1 and (self.layout.sharded or phase == "update"):
            refuse(phase, f"{reason}; ranks that wait for one another cannot make it again")
        which = "update_batch" if phase in sampling.update_phases else "branch_batch"
        rows = getattr(sampling, which)
        if self.midway or rows == 1:
            refuse(phase, reason)
        setattr(sampling, which, rows // 2)
        self.on_message(
            f"Out of memory in the phase {phase!r}: from here on {rows // 2} rows a forward in it, "
            f"not {rows} ({reason})"
        )

    def _enter(self, phase: str) -> None:
        self.ranks.phase(phase)
        self.on_phase(phase)

    def _count(self, rows: int) -> None:
        self.on_evaluations(rows * self.ranks.count)

    def _progress(self, rows: int) -> None:
        """Between two forwards. Ranks that share them can only stop where all of them are."""
        self._count(rows)
        if self.should_stop():
            self.ranks.ask_to_stop()
        if not self.layout.sharded and (self.should_stop() or self.ranks.asked_to_stop):
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
