"""What the groups hold their values to."""

from __future__ import annotations

import math

from ..errors import ConfigurationError


def expect(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ConfigurationError(f"{name} is {value!r}; expected {expected}")


def finite(value: float) -> bool:
    return math.isfinite(value)


def distinct(name: str, values: list[int] | list[str]) -> None:
    expect(name, values, len(values) > 0, "at least one")
    expect(name, values, len(set(values)) == len(values), "no value twice")
