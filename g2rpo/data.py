"""Prompts: read from a file, and which of them an update works on, from the run seed and the
update's number alone."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .config import Config
from .errors import ConfigurationError
from .seeds import permutation


def read_prompts(
    path: str | Path, column: str = "prompt", key: str = "data.prompts"
) -> list[str]:
    """The prompts of a UTF-8 file, in its order. key: what named the file, for errors.

    .jsonl: an object a line, whose key `column` is the prompt. .csv: a header row, whose `column`
    holds the prompts; a prompt with commas, quotes or newlines stands in double quotes. Any other:
    a prompt a line. Whitespace around a prompt is stripped, blank ones are skipped, and repeated
    ones are kept once.

    Raises ConfigurationError when there is no such file, no prompt in it, or when a line is other
    than described.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ConfigurationError(
            f"{key} is {str(path)!r}; expected a file of prompts: text, .jsonl or .csv"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor's byte order mark is no prompt's
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{key} is {str(path)!r}; expected UTF-8 text: {error}") from error
    if path.suffix.lower() in (".json", ".tsv", ".parquet", ".xlsx"):
        raise ConfigurationError(
            f"{key} is {str(path)!r}; expected text, .jsonl or .csv: its lines would be "
            "taken for prompts"
        )
    reader = {".jsonl": _json_prompts, ".csv": _csv_prompts}.get(path.suffix.lower())
    found: Iterable[str] = text.splitlines() if reader is None else reader(text, column)
    try:
        prompts = list(dict.fromkeys(stripped for prompt in found if (stripped := prompt.strip())))
    except _WrongLine as wrong:
        raise ConfigurationError(f"{key} is {str(path)!r}; {wrong}") from wrong
    if not prompts:
        raise ConfigurationError(f"{key} is {str(path)!r}, which holds no prompt")
    return prompts


def read_evaluation_prompts(config: Config, prompts: Sequence[str]) -> list[str]:
    """Those of data.evaluation_prompts, as `read_prompts`; where it is null, `prompts`."""
    path = config.data.evaluation_prompts
    if path is None:
        return list(prompts)
    return read_prompts(path, config.data.column, "data.evaluation_prompts")


class _WrongLine(ValueError):
    """What is wrong with a line, which it names by its number."""

    def __init__(self, line: int, fault: str) -> None:
        super().__init__(f"line {line}: {fault}")


def _json_prompts(text: str, column: str) -> Iterator[str]:
    # Not splitlines(): U+2028 and its like may stand inside a JSON string as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise _WrongLine(number, f"expected a JSON object: {error}") from error
        if not isinstance(row, dict):
            raise _WrongLine(number, f"expected a JSON object, found {line[:80]!r}")
        if column not in row:
            raise _WrongLine(number, _no_column("key", column, list(row)))
        prompt = row[column]
        if not isinstance(prompt, str):
            raise _WrongLine(number, f"{column!r} is {prompt!r}; expected text")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, as in "\ud83d"
            raise _WrongLine(number, f"{column!r} is no valid Unicode: {error}") from error
        yield prompt


def _csv_prompts(text: str, column: str) -> Iterator[str]:
    rows = csv.reader(io.StringIO(text), strict=True)  # lines end at "\n" and nowhere else
    columns: list[str] | None = None
    begins = 1
    try:
        for row in rows:
            number, begins = begins, rows.line_num + 1
            if not row:  # a blank line
                continue
            if columns is None:
                columns = [name.strip() for name in row]
                if columns.count(column) != 1:
                    twice = f"column {column!r} (data.column) is there more than once"
                    fault = twice if column in columns else _no_column("column", column, columns)
                    raise _WrongLine(number, fault)
                continue
            if len(row) != len(columns):  # an unquoted comma would cut the prompt in two
                raise _WrongLine(
                    number, f"{len(row)} fields under a header of {len(columns)}; expected as "
                    "many, and a prompt with commas in double quotes",
                )  # fmt: skip
            yield row[columns.index(column)]
    except csv.Error as error:
        raise _WrongLine(begins, f"expected comma-separated values: {error}") from error


def _no_column(kind: str, column: str, found: Sequence[str]) -> str:
    names = ", ".join(repr(name) for name in found) or "nothing"
    return f"no {kind} {column!r}, only {names}; expected data.column to name the prompt's"


class PromptSampler:
    """Shuffled epochs over the prompts; the last, short batch of an epoch is dropped.

    Update u's prompts depend on (run seed, u) alone, so a resumed run goes on where it was, and no
    prompt is twice in one update.
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
        self._order: tuple[int, list[int]] = (-1, [])  # the newest epoch's, kept for its updates

    def ids(self, update: int) -> list[int]:
        """Prompt ids (indices) of an update, counted from 1."""
        updates_per_epoch = len(self.prompts) // self.per_update
        epoch, index = divmod(update - 1, updates_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, permutation(self.run_seed, epoch, len(self.prompts))
        return self._order[1][index * self.per_update : (index + 1) * self.per_update]


def prompts_of_run(
    config: Config, prompts: Sequence[str], evaluation_prompts: Sequence[str] | None = None
) -> list[str]:
    """What a run of this configuration draws, each prompt once, in order of first use.

    The fixed evaluation comes before the first update, so its prompts come first: from `prompts`,
    or from evaluation_prompts if those are given.
    """
    train = config.train
    sampler = PromptSampler(prompts, train.prompts_per_update, train.seed)
    evaluated = prompts if evaluation_prompts is None else evaluation_prompts
    used = dict.fromkeys(evaluated[: train.evaluation_samples])
    left = set(prompts).difference(used)
    for update in range(1, train.updates + 1):
        if not left:
            break
        drawn = [prompts[i] for i in sampler.ids(update)]
        used.update(dict.fromkeys(drawn))
        left.difference_update(drawn)
    return list(used)
