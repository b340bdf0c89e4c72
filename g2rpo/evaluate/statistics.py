"""What a table of rewards says: means, 95 % bootstrap intervals, and what changed between pairs.

Images of two policies that start from the same noise and prompt are a pair, so a change is judged
by the differences within pairs, whose spread is far smaller than that between images. The intervals
are over images: how far a mean would move if as many others had been drawn in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

from ..metrics import number

RESAMPLES = 9999
CONFIDENCE = 0.95
BATCH = 2**22  # numbers of resamples that are in memory at once


@dataclass(frozen=True)
class Estimate:
    """A mean over images, and the interval that 95 % of the bootstrap's means lie in."""

    mean: float  # NaN where no image was scored, as are the others
    low: float
    high: float
    count: int  # images, or pairs, that it is over: those whose scores are finite

    @property
    def text(self) -> str:
        """'0.798 [0.770, 0.826]'; the mean alone where there is no interval, a dash for neither."""
        if not math.isfinite(self.mean):
            return "–"
        low, high = number(self.low), number(self.high)
        return number(self.mean) + (f" [{low}, {high}]" if self.has_interval else "")

    @property
    def has_interval(self) -> bool:
        """Two images or more were scored: one says nothing of others."""
        return math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Comparison:
    """A reward over the images of a policy, and of a base policy where there is one."""

    reward: str
    heldout: bool  # a judge that the training never saw
    policy: Estimate
    base: Estimate | None = None
    change: Estimate | None = None  # policy - base, over pairs
    win_rate: Estimate | None = None  # share of pairs where the policy's is higher; equal: a half
    failed: int = 0  # scores, of either policy, that are not finite
    trained: bool | None = None  # on; None: nothing is known of a training

    @property
    def mark(self) -> str:
        """In-domain: trained on. Held-out: neither trained on nor looked at in training. Reported:
        of weight 0 in a run that is not told to hold it out. '': nothing is known of a training."""
        if self.heldout:
            return "held-out"
        return "" if self.trained is None else "in-domain" if self.trained else "reported"


def estimate(values: Tensor, resamples: int = RESAMPLES) -> Estimate:  # [M]
    """Mean and percentile bootstrap interval (Efron 1979) over the finite values.

    The same values give the same interval every time.
    """
    array = values.detach().double().cpu().numpy()
    array = array[np.isfinite(array)]
    mean = float(array.mean()) if len(array) else math.nan
    if len(array) < 2:  # one image says nothing of others
        return Estimate(mean, math.nan, math.nan, len(array))
    interval = stats.bootstrap(
        (array,), np.mean, n_resamples=resamples, confidence_level=CONFIDENCE,
        method="percentile", batch=max(1, BATCH // len(array)), rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return Estimate(mean, float(interval.low), float(interval.high), len(array))


def compare(
    reward: str,
    heldout: bool,
    policy: Tensor,  # [M]
    base: Tensor | None = None,  # [M], of the same prompts and noises
    resamples: int = RESAMPLES,
    trained: bool | None = None,
) -> Comparison:
    """A row of the table. A score that is not finite takes its pair out, and is counted."""
    failed = int((~policy.isfinite()).sum())
    if base is None:
        alone = estimate(policy, resamples)
        return Comparison(reward, heldout, alone, failed=failed, trained=trained)
    if base.shape != policy.shape:
        raise ValueError(
            f"base has shape {tuple(base.shape)}; expected {tuple(policy.shape)}, as the policy's"
        )
    difference = policy.double() - base.double()
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    wins = wins.where(difference.isfinite(), math.nan)
    return Comparison(
        reward,
        heldout,
        estimate(policy, resamples),
        estimate(base, resamples),
        estimate(difference, resamples),
        estimate(wins, resamples),
        failed + int((~base.isfinite()).sum()),
        trained,
    )
