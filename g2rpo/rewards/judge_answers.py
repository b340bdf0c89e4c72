"""From what a judge answers to its score."""

from __future__ import annotations

import re

# "Score: 8", "**Final Score:** 8/10", "Alignment Score (1-5): 3.5", {"score": 0.5}; but no part of
# a number: neither the 8 of "8%" and "8x" nor the 4 of "4,5".
SCORE = re.compile(
    r"(?<![a-z])score[\"'*_`\s]*(?:\([^()]*\)[\"'*_`\s]*)?[:=][\"'*_`\s]*"
    r"([+-]?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)(?![\w%]|[.,][0-9])"
    r"(?:\s*/\s*([0-9]+(?:\.[0-9]+)?))?",
    re.IGNORECASE,
)


class OutOfRange(ValueError):
    """An answer has a score, but none that was asked for."""


def parse_score(answer: str, low: float, high: float) -> float:
    """The last number of the form "Score: x" or {"score": x}, from [low, high] to [0, 1].

    Words before "score", a parenthesis after it, quotes and Markdown are passed over; "x/y" is x
    where y is high.

    Raises OutOfRange, a ValueError, for a number outside [low, high] or "of" another y, and
    ValueError where there is none.
    """
    found = SCORE.findall(answer)
    if not found:
        raise ValueError(f"no 'Score: x' in {answer!r}")
    number, whole = found[-1]
    if not low <= float(number) <= high or (whole and float(whole) != high):
        shown = f"{number}/{whole}" if whole else number
        raise OutOfRange(f"the score is {shown}, expected a number from {low:g} to {high:g}")
    return (float(number) - low) / (high - low)
