"""A value of one key for each method, so that none is judged by a setting that suits another.

Chosen by the trained reward at the end of the budget, as a person without a judge would, on seeds
that the comparison does not use.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import ConfigurationError
from ..metrics import number
from .methods import Method, check_methods, make_method
from .table import Curve

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SWEEP_SEEDS = (1000, 1001)  # a comparison's are less than these


@dataclass(frozen=True)
class Sweep:
    """KEY=VALUE,VALUE,...; `choose` fills the last two."""

    key: str
    values: Sequence[str]
    chosen: dict[str, str] = field(default_factory=dict)  # value, by the method's label
    reached: dict[str, dict[str, float]] = field(default_factory=dict)  # reward, by label and value

    @staticmethod
    def parse(text: str) -> Sweep:
        key, _, rest = text.partition("=")
        values = re.split(r",(?![^\[]*\])", rest)  # not at the commas of a list
        if not key or not all(values) or len(set(values)) < len(values):
            raise ConfigurationError(
                f"--sweep is {text!r}; expected KEY=VALUE,VALUE,..., each value once"
            )
        return Sweep(key, values)

    def variants(
        self, parser: ArgumentParser, texts: Sequence[str], overrides: Sequence[str]
    ) -> list[Method]:
        """Each of the methods `texts` with each of the values, method by method."""
        found = [
            make_method(parser, f"{text} {shlex.quote(f'{self.key}={value}')}", overrides)
            for text in texts
            for value in self.values
        ]
        check_methods(found)
        return found

    def choose(
        self,
        methods: Sequence[Method],
        variants: Sequence[Method],  # as `variants` gives them
        curves: Sequence[Curve],  # of their runs, in any order
        reward: str,
    ) -> list[Method]:
        """The methods under their names, each with the value whose runs end with the highest mean
        of the reward; the judges have no say.

        Raises ConfigurationError where a method's reward is a number with none of the values.
        """
        best = []
        for index, method in enumerate(methods):
            tried = variants[index * len(self.values) : (index + 1) * len(self.values)]
            reached = {
                value: statistics.fmean(
                    curve.values(f"reward/{reward}/mean")[-1]
                    for curve in curves
                    if curve.run.method.label == variant.label
                )
                for value, variant in zip(self.values, tried)
            }
            finite = [value for value, score in reached.items() if math.isfinite(score)]
            if not finite:
                raise ConfigurationError(
                    f"--sweep tries {', '.join(self.values)}; expected a value of {self.key} with "
                    f"which {reward} of {method.label} stays a number"
                )
            value = max(finite, key=reached.__getitem__)
            self.reached[method.label], self.chosen[method.label] = reached, value
            config = tried[self.values.index(value)].config
            best.append(Method(method.label, config, (*method.changed, f"{self.key}={value}")))
            print(f"{method.label}: {self._told(method.label)}")
        return best

    def sentence(self, reward: str) -> str:
        """What has been chosen, for a document."""
        told = "; ".join(f"{label}: {self._told(label)}" for label in self.chosen)
        seeds = " and ".join(map(str, SWEEP_SEEDS))
        return (
            f"{self.key} of each method is that of the highest {reward} at the end, on seeds "
            f"{seeds}. {told}."
        )

    def _told(self, label: str) -> str:
        """'optimizer.lr=3e-4 (0.931 with 1e-4, 0.950 with 3e-4)'"""
        found = self.reached[label].items()
        told = ", ".join(f"{number(score)} with {value}" for value, score in found)
        return f"{self.key}={self.chosen[label]} ({told})"
