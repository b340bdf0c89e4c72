"""The gate on FP8 completions: what they change, measured on one update's own rollout.

    g2rpo doctor --fp8 [PRESET|FILE.yaml --group.key value ...]

The same anchors and branches are completed in FP8 and in the training precision, so that every
difference is FP8's. Importance ratios must not see any of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigurationError
from .objective import integrate_advantages
from .scoring import score_rollout
from .trainer import Trainer

UPDATES = 3  # that `g2rpo doctor --fp8` rolls out


@dataclass(frozen=True)
class Agreement:
    """FP8 against the training precision, over `updates` updates."""

    updates: int
    velocity_error: list[tuple[float, float]]  # (sigma, |difference| / |velocity|, rms over rows)
    rank_correlation: dict[str, float]  # by reward: Spearman's over a group's branches, mean
    sign_agreement: float  # share of advantages of one sign
    log_prob_difference: float  # largest |log_prob in the update - stored old_log_prob|
    not_finite: int  # finished latents with a NaN or infinity in FP8 that have none without

    @property
    def exact(self) -> bool:
        return self.log_prob_difference == 0.0


def measure(trainer: Trainer, updates: int = 1) -> Agreement:
    """Roll out `updates` updates in both precisions and compare; then improve the policy as it
    would be, so that the next one begins elsewhere.

    trainer: with rollout.precision fp8 and objective.stepping accumulate.
    """
    config = trainer.config
    if config.rollout.precision != "fp8":
        raise ConfigurationError(
            f"rollout.precision is {config.rollout.precision!r}; expected 'fp8', to compare it"
        )
    engine = trainer.sampling.engine
    fp8, weights = engine.precision, [r.weight for r in trainer.trained]
    errors: dict[float, list[Tensor]] = {}
    ranks: dict[str, list[Tensor]] = {reward.name: [] for reward in trainer.trained}
    signs, differences, not_finite = [], [], 0
    for _ in range(updates):
        number = trainer.updates + 1
        ids = trainer.sampler.ids(number)
        prompts = [trainer.sampler.prompts[i] for i in ids]
        conditions = trainer.model.embed(prompts)
        found = {}
        for name, precision in (("fp8", fp8), ("plain", nullcontext())):
            engine.precision = precision
            rollout = trainer.roll_out(number, ids, conditions)
            with trainer.scoring():
                rewards = score_rollout(
                    trainer.model, rollout.finished, rollout.anchors, prompts, trainer.trained,
                    trainer.sampling.branch_batch,
                ).images  # fmt: skip
            advantages = integrate_advantages(rewards, config.rollout.group_size, weights)
            found[name] = rollout.finished, rewards, advantages.values
        engine.precision, chunks = fp8, rollout.chunks
        bad = [~found[name][0].isfinite().flatten(3).all(3) for name in ("fp8", "plain")]
        not_finite += int((bad[0] & ~bad[1]).sum())
        for reward, a, b in zip(trainer.trained, found["fp8"][1], found["plain"][1], strict=True):
            ranks[reward.name].append(_spearman(a, b, config.rollout.group_size))
        signs.append((found["fp8"][2].sign() == found["plain"][2].sign()).double().flatten())
        for rows, branches in chunks:
            for step in map(branches.step, range(len(branches))):
                given = step.latents, step.sigmas, conditions[rows]
                plain = trainer.policy.predict(*given).double()
                with fp8:
                    ours = trainer.policy.predict(*given).double()
                square = (ours - plain).flatten(1).square().sum(1)
                error = square / plain.flatten(1).square().sum(1)
                errors.setdefault(float(step.sigmas[0]), []).append(error)
        fp8.release()  # they would be of the weights of before
        result = trainer.improver.improve(chunks, conditions, found["fp8"][2])
        stored = [b.old_log_prob[i] for i in range(len(chunks[0][1])) for _, b in chunks]
        differences += [
            (out.log_prob - old).abs().max() for out, old in zip(result.losses, stored, strict=True)
        ]
        trainer.improver.stepping = False
        trainer.updates = number
    return Agreement(
        updates=updates,
        velocity_error=[(s, float(torch.cat(e).mean().sqrt())) for s, e in errors.items()],
        rank_correlation={name: float(torch.cat(r).nanmean()) for name, r in ranks.items()},
        sign_agreement=float(torch.cat(signs).mean()),
        log_prob_difference=float(torch.stack(differences).max()),
        not_finite=not_finite,
    )


def _spearman(a: Tensor, b: Tensor, group_size: int) -> Tensor:  # [J, B * G, K] -> [J * B * K]
    """Spearman's rank correlation of each group's G rewards; NaN where one side is all ties."""
    ranks = []
    for rewards in (a, b):
        groups = rewards.unflatten(1, (-1, group_size)).movedim(2, -1)  # [J, B, K, G]
        less = groups[..., None] > groups[..., None, :]
        equal = groups[..., None] == groups[..., None, :]
        rank = (less + 0.5 * equal).sum(-1).double()  # ties share the mean of their ranks
        ranks.append(rank - rank.mean(-1, keepdim=True))
    x, y = ranks
    return ((x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()).flatten()


def lines(agreement: Agreement, names: Sequence[str]) -> list[tuple[str, str]]:
    """(what, value) for the doctor."""
    rows = [
        (f"velocity error at sigma {sigma:.3f}", f"{error:.2%}")
        for sigma, error in agreement.velocity_error
    ]
    rows += [
        (f"rank agreement of {name}", f"{agreement.rank_correlation[name]:.3f} (Spearman)")
        for name in names
    ]
    exact = "exactly 0" if agreement.exact else f"{agreement.log_prob_difference:.3g}, expected 0"
    return [
        *rows,
        ("advantages of the same sign", f"{agreement.sign_agreement:.1%}"),
        ("log_prob, rollout to update", exact),
        ("images that only FP8 broke", f"{agreement.not_finite:,}"),
    ]


def main(arguments: Sequence[str]) -> int:
    """`g2rpo doctor --fp8`: on the digits, or on the run that the arguments describe. Returns 0, or
    1 where FP8 has reached a log-probability."""
    from .arguments import make_parser, named_config
    from .doctor import show
    from .models import load_model
    from .rewards.build import make_rewards

    with_fp8 = ["--model.fuse", "true", "--rollout.precision", "fp8"]
    config, _ = named_config(make_parser(), [*(arguments or ["digits"]), *with_fp8])
    config.validate()
    config.rewards = [reward for reward in config.rewards if not reward.heldout]  # never asked
    if config.objective.stepping != "accumulate":
        raise ConfigurationError(
            f"objective.stepping is {config.objective.stepping!r}; expected 'accumulate', under "
            "which log-probabilities must not move at all"
        )
    rewards = make_rewards(config)  # first: what is missing should not cost loading a model
    trainer = Trainer(config, load_model(config), rewards, on_message=print)
    emulated = trainer.sampling.engine.precision.emulate
    agreement = measure(trainer, UPDATES)
    hardware = "emulated, for want of hardware" if emulated else "by the hardware"
    show(
        f"FP8 completions of {config.model.path}, {hardware}, against those without, over "
        f"{agreement.updates} updates",
        lines(agreement, [reward.name for reward in trainer.trained]),
    )
    return 0 if agreement.exact else 1
