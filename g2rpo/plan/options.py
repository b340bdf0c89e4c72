"""The options of `g2rpo plan` that are no keys of a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import ConfigurationError
from .cards import CARDS
from .gpus import MOST, NETWORK, PER_NODE, Gpus

VALUED = {
    "--gpu": f"one of {', '.join(CARDS)}, or a memory size such as 80GB",
    "--gpus": f"a number of GPUs from 1 to {MOST}, or several as 8,16,64",
    "--per-node": "GPUs of a node, such as 8",
    "--network": "GB/s that a GPU sends to other nodes, such as 50",
    "--strategy": "replicate, shard or hybrid",
    "--price": "dollars a GPU-hour",
}


def gpus_of(options: Mapping[str, str | None]) -> tuple[tuple[Gpus, ...], float | None]:
    """The numbers of GPUs that are planned for, ascending, and the price of an hour of one.

    Raises ConfigurationError naming the option.
    """
    text = options["--gpus"] or "1"
    counts = sorted({_whole("--gpus", each, text) for each in text.split(",")})
    per_node = options["--per-node"]
    node = PER_NODE if per_node is None else _whole("--per-node", per_node, per_node)
    price = _number(options, "--price", 0.0, 1e6, "dollars a GPU-hour, such as 2.50")
    network = _number(options, "--network", 1e-3, 1e6, VALUED["--network"])
    rate = NETWORK if network is None else 1e9 * network
    return tuple(Gpus(count, node, rate) for count in counts), price


def with_strategy(rest: Sequence[str], strategy: str | None) -> list[str]:
    """--strategy as the key that it stands for, after the preset and all other keys."""
    return [*rest, *(() if strategy is None else ("--distributed.strategy", strategy))]


def _whole(option: str, part: str, text: str) -> int:
    count = int(part) if part.strip().isascii() and part.strip().isdigit() else 0
    if not 1 <= count <= MOST:
        expected = VALUED[option] if option == "--gpus" else f"a whole number from 1 to {MOST}"
        raise ConfigurationError(f"{option} is {text!r}; expected {expected}")
    return count


def _number(
    options: Mapping[str, str | None], name: str, low: float, below: float, expected: str
) -> float | None:
    text = options[name]
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not low <= value < below:
        raise ConfigurationError(f"{name} is {text!r}; expected {expected}")
    return value
