"""The evaluations of a run: what each leaves in its directory, and the watch over them.

    samples/update-000020.png     a grid of its images
    scores/update-000020.json     its scores, image by image: {"update": 20, "prompts": [M],
                                  "scores": {name: [M]}}; null where one was not finite

Those of update 0, the starting policy's, are read back when a run goes on, for the win rates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hacking
from .checkpoint import list_checkpoints, update_of
from .grids import sample_path, write_grid
from .metrics import Row, write_beside
from .trackers import Tracker
from .trainer import Trainer

GRID_IMAGES = 80  # of an evaluation's images, the most that a grid shows


class Evaluations:
    """Makes the evaluations of the run in run_dir. on_message(text): what a person should know.

    alarm: that of the newest one, where reward hacking is to be feared. ended: what to say where
    train.hacking_stop ends the run, "" as long as it goes on.
    """

    def __init__(self, run_dir: Path, trainer: Trainer, on_message: Callable[[str], None]) -> None:
        self.run_dir, self.trainer, self.on_message = run_dir, trainer, on_message
        self.alarm: hacking.Alarm | None = None
        self.ended = ""
        self._rows: list[Row] = []  # with an evaluation, in order
        self._start: Tensor | None = None  # [R, M], scores of the starting policy
        if trainer.ranks.lead:
            self._tell_of_prompts()

    def resume(self, rows: Sequence[Row]) -> None:
        """Take over the rows of a run that is being continued, and the scores it started with."""
        self._rows = hacking.evaluated(rows)
        self.alarm = hacking.watch(self._rows)
        stop = self.trainer.config.train.hacking_stop
        if stop and self._rows and not hacking.is_watched(self._rows[0]):
            self.on_message(
                f"train.hacking_stop is {stop} and will not act: this run was started by a version "
                "that kept no intervals of its rewards"
            )
        names = [reward.name for reward in self.trainer.rewards]
        path = scores_path(self.run_dir, 0)
        try:
            self._start = read_scores(path, names, self.trainer.evaluation_prompts)
        except (OSError, ValueError) as error:  # of a version that did not keep them, or damaged
            self.on_message(
                f"{path} cannot be used, so evaluations have no win rates from here on: {error}"
            )

    def evaluate(self, tracker: Tracker) -> dict[str, Any]:
        """Metrics keys of an evaluation at this update; all else is in the directory by then."""
        trainer, number = self.trainer, self.trainer.updates
        row, images, scores = trainer.evaluate(self._start)
        if images is None:  # another rank writes
            return row
        scores = scores.cpu()
        if number == 0:
            self._start = scores
            row |= {f"reward/{r.name}/weight": r.weight for r in trainer.trained}
        names = [reward.name for reward in trainer.rewards]
        write_scores(
            scores_path(self.run_dir, number), number, names, trainer.evaluation_prompts, scores
        )
        self._write_samples(images, tracker)
        self._rows.append({"update": number, **row})
        return row | self._watch()

    def _watch(self) -> dict[str, Any]:
        """Metrics keys; says the first alarm, and sets `ended` once there are enough of them."""
        if not hacking.is_watched(self._rows[0]):
            return {}
        self.alarm = hacking.watch(self._rows)
        if self.alarm is None:
            return {"heldout_fallen": 0}
        if len(hacking.alarms(self._rows)) == 1:
            self.on_message(hacking.advice(self.alarm, self._sound_checkpoint()))
        stop, count = self.trainer.config.train.hacking_stop, hacking.in_a_row(self._rows)
        if 0 < stop <= count:
            last = "last evaluation warns" if count == 1 else f"last {count} evaluations warn"
            self.ended = (
                f"Ended after update {self.trainer.updates}, since the {last} of reward hacking "
                f"(train.hacking_stop {stop}). To go on all the same: "
                f"g2rpo train --resume {self.run_dir} --train.hacking_stop 0"
            )
        return {"heldout_fallen": len(self.alarm.fell)}

    def _sound_checkpoint(self) -> int | None:
        """The newest checkpoint whose update was evaluated without an alarm."""
        kept = {update_of(path) for path in list_checkpoints(self.run_dir / "checkpoints")}
        bad = {alarm.update for alarm in hacking.alarms(self._rows)}
        return max((r["update"] for r in self._rows if r["update"] in kept - bad), default=None)

    def _write_samples(self, images: Tensor, tracker: Tracker) -> None:
        number, folder = self.trainer.updates, self.run_dir / "samples"
        folder.mkdir(exist_ok=True)
        broken = int((~images.isfinite()).flatten(1).any(1).sum())
        if broken:  # no reason to end a run; the scores of such images are NaN and counted as such
            self.on_message(
                f"Update {number}: {broken} of {len(images)} evaluation images hold NaN or "
                "infinite pixels; no grid of samples is drawn"
            )
            return
        grid, prompts = sample_path(folder, number), self.trainer.evaluation_prompts
        write_grid(images[:GRID_IMAGES], prompts[:GRID_IMAGES], grid)
        tracker.image(grid, number)

    def _tell_of_prompts(self) -> None:
        """What data.evaluation_prompts promises and does not hold."""
        if self.trainer.config.data.evaluation_prompts is None:
            return
        drawn = set(self.trainer.evaluation_prompts)
        if both := drawn.intersection(self.trainer.sampler.prompts):
            self.on_message(
                f"{len(both):,} of the {len(drawn):,} prompts of the evaluations "
                "(data.evaluation_prompts) are trained on as well: these are not held out"
            )
        given = len(self.trainer.model.evaluation_prompts)
        if given > len(drawn):
            self.on_message(
                f"Of the {given:,} prompts in data.evaluation_prompts the first {len(drawn):,} are "
                "drawn (train.evaluation_samples)"
            )


def scores_path(run_dir: Path, update: int) -> Path:
    return run_dir / "scores" / f"update-{update:06d}.json"


def write_scores(
    path: Path,
    update: int,
    names: Sequence[str],  # R
    prompts: Sequence[str],  # M
    scores: Tensor,  # float64 [R, M]
) -> None:
    """An evaluation's scores as strict JSON, bit for bit."""
    values = {
        name: [value if math.isfinite(value) else None for value in line]
        for name, line in zip(names, scores.tolist(), strict=True)
    }
    content = {"update": update, "prompts": list(prompts), "scores": values}
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=0)
    write_beside(path, text.encode())


def read_scores(path: Path, names: Sequence[str], prompts: Sequence[str]) -> Tensor:
    """Float64 [R, M] of such a file, NaN where it has null.

    Raises OSError, or ValueError when it is of other prompts or lacks scores.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("prompts") != list(prompts):
        raise ValueError("it is of other prompts than those of the evaluations")
    lines = content.get("scores")
    if not isinstance(lines, dict) or not set(names) <= lines.keys():
        raise ValueError(f"it has scores of {list(lines or ())}; expected {list(names)}")
    for name in names:
        if len(lines[name]) != len(prompts):
            raise ValueError(f"{len(lines[name])} scores of {name!r}; expected {len(prompts)}")
    scores = [[math.nan if v is None else v for v in lines[name]] for name in names]
    return torch.tensor(scores, dtype=torch.float64)
