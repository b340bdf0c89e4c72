"""Prompts: which prompts an update works on, from the run seed and the update's number alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import ConfigurationError
from .seeds import permutation


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8; blank lines are skipped, repeated prompts kept once.

    Raises ConfigurationError when there is no such file, no prompt in it, or other than text.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"data.prompts is {str(path)!r}; expected a text file of prompts")
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor's byte order mark is no prompt's
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"data.prompts is {str(path)!r}; expected UTF-8 text: {error}"
        ) from error
    lines = (line.strip() for line in text.splitlines())
    prompts = list(dict.fromkeys(line for line in lines if line))
    if not prompts:
        raise ConfigurationError(f"data.prompts is {str(path)!r}, which holds no prompt")
    return prompts


class PromptSampler:
    """Shuffled epochs over the prompts; the last, short batch of an epoch is dropped.

    Stateless: update u's prompts depend on (run seed, u), so a resumed run goes on where it was,
    and no prompt is twice in one update.
    """

    def __init__(self, prompts: Sequence[str], per_update: int, run_seed: int) -> None:
        if not 1 <= per_update <= len(prompts):
            raise ConfigurationError(
                f"train.prompts_per_update is {per_update}; expected 1 to {len(prompts)}, "
                "the number of prompts"
            )
        self.prompts = list(prompts)
        self.per_update = per_update
        self.run_seed = run_seed

    def ids(self, update: int) -> list[int]:
        """Prompt ids (indices) of an update, counted from 1."""
        updates_per_epoch = len(self.prompts) // self.per_update
        epoch, index = divmod(update - 1, updates_per_epoch)
        order = permutation(self.run_seed, epoch, len(self.prompts))
        return order[index * self.per_update : (index + 1) * self.per_update]
