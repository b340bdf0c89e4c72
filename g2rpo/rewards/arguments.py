"""What a person gives a reward by name, held against what its function or class takes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigurationError

OWN = ("device", "path", "dtype")  # keys of their own, or the trainer's: never options


def check_names(
    where: str,
    name: str,
    called: Callable[..., Any],
    given: Mapping[str, Any],  # what it is called with beside the options
    options: Mapping[str, Any],
) -> None:
    """Raise ConfigurationError for a parameter that `called` has not, or misses.

    where: how the error begins; name: what `called` is in it. Values are not shown: some may be
    secret.
    """
    parameters = inspect.signature(called).parameters.values()
    named = {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for key in given:
            if key not in named:
                raise ConfigurationError(
                    f"{where}: {name} has no parameter {key!r}, which it is called with; expected "
                    f"one beside {', '.join(named) or 'none'}"
                )
        known = [key for key in named if key not in given and key not in OWN]
        if unknown := [key for key in options if key not in known]:
            raise ConfigurationError(
                f"{where}: options has {unknown[0]!r}; expected only what {name} takes: "
                f"{', '.join(known) or 'nothing'}"
            )
    elif taken := [key for key in options if key in given or key in OWN]:
        raise ConfigurationError(
            f"{where}: options has {taken[0]!r}; expected options apart from {', '.join(OWN)}"
        )
    for key, required in named.items():
        if required and key not in given and key not in options:
            place = "as the reward's path" if key == "path" else "among the options"
            raise ConfigurationError(
                f"{where}: {name} has no default for {key!r}; expected a value {place}"
            )


def check_types(where: str, called: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for an option that is not of the type that `called` declares."""
    hints, parameters = get_type_hints(called), inspect.signature(called).parameters
    for key, value in options.items():
        if not _fits(value, hints[key]):
            raise ConfigurationError(
                f"{where}: options.{key} is {value!r}; expected {parameters[key].annotation}"
            )


def _fits(value: object, hint: Any) -> bool:
    """Whether YAML's value is of that type; a path is written as text."""
    kind = get_origin(hint) or hint
    if kind in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    if kind is tuple:
        kinds = get_args(hint)
        several = isinstance(value, (list, tuple)) and len(value) == len(kinds)
        return several and all(_fits(one, of) for one, of in zip(value, kinds))
    return isinstance(value, str) if kind is Path else isinstance(value, kind)
