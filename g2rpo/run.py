"""A run: the trainer with everything a person wants around it.

    runs/digits-20260101-120000/
        config.yaml      the resolved configuration
        metrics.jsonl    a row an update
        samples/         grids of the same noises at every evaluation
        scores/          what every image of it scored
        checkpoints/     step-000010/ ...
        curves.png, report.html

`start` begins a run in a new directory; `resume` goes on from its newest whole checkpoint, as if
nothing had happened: weights, optimizer and draws are bit for bit those of an undisturbed run.
Several ranks run this side by side: the lead alone writes and shows, but for checkpoints.
"""

from __future__ import annotations

import re
import shutil
import signal
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from . import hacking
from .checkpoint import load_checkpoint, save_checkpoint
from .config import Config
from .distributed import ALONE, Ranks
from .errors import ConfigurationError, TrainingError
from .evaluations import Evaluations
from .lock import alone
from .metrics import MetricsLog, closing_line, write_beside
from .models import be_deterministic, choose_device, load_model
from .optimizers import rounds_to_nearest
from .policy import Model
from .report import write_report
from .rewards.build import make_rewards
from .stopping import StopRequest
from .trackers import make_tracker
from .tracking import Display, Quiet
from .trainer import Interrupted, Trainer

CONTENTS = (
    "config.yaml", "metrics.jsonl", "curves.png", "report.html", "samples", "scores",
    "checkpoints", "tensorboard", "wandb", "tracker.json",
)  # fmt: skip


def holds_run(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in CONTENTS)


def start(
    config: Config, run_dir: Path, *, overwrite: bool = False, ranks: Ranks = ALONE
) -> int:
    """Train from the beginning in `run_dir`. Returns an exit code: 0, or 128 + signal.

    Where torchrun has restarted the ranks, goes on with the run they have begun there, and with no
    other: what was refused at the first start is refused again.
    Raises ConfigurationError when run_dir holds another run, unless overwrite removes that first.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigurationError(f"train.output is {str(run_dir)!r}, a file; expected a directory")
    begun, ours = ranks.from_lead((holds_run(run_dir), ranks.launch.noted(run_dir)))
    if begun and ours:
        return resume(config, run_dir, ranks)
    if begun and not overwrite:
        raise ConfigurationError(
            f"train.output is {str(run_dir)!r}, which holds another run; expected a new "
            f"directory, or --overwrite, or `g2rpo train --resume {run_dir}`"
        )
    run = _Run(config, run_dir, ranks)  # all that can be wrong is found before anything is written
    if ranks.lead:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"train.output is {str(run_dir)!r}; expected a directory that can be made: {error}"
            ) from error
    with _alone(run_dir) if ranks.lead else nullcontext():
        if overwrite and ranks.lead:
            for name in CONTENTS:
                path = run_dir / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if ranks.lead:
            ranks.launch.note(run_dir)
        ranks.meet()
        return run.train()


def resume(config: Config, run_dir: Path, ranks: Ranks = ALONE) -> int:
    """Go on with the run in `run_dir`; config is its own, with what may change changed."""
    with _alone(run_dir) if ranks.lead else nullcontext():
        ranks.meet()
        return _Run(config, run_dir, ranks).train()


def _alone(run_dir: Path) -> AbstractContextManager[None]:
    """Two processes in one run directory would overwrite each other's files."""
    return alone(run_dir, f"another process is training in {run_dir}; expected it to end first")


class _Dumper(yaml.SafeDumper):
    """Quotes text that jsonargparse would read back as a number and PyYAML would not: '1e3'."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)  # fmt: skip


def write_config(config: Config, run_dir: Path) -> None:
    text = yaml.dump(asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    write_beside(run_dir / "config.yaml", text.encode())


class _Run:
    """One process's share of a run: the trainer, its directory, and the person watching."""

    def __init__(self, config: Config, run_dir: Path, ranks: Ranks) -> None:
        self.run_dir, self.log, self.ranks = run_dir, MetricsLog(run_dir / "metrics.jsonl"), ranks
        self.stop = StopRequest()
        if config.train.deterministic:
            be_deterministic(choose_device(config.model.device))
        self.display: Display | Quiet | None = None
        rewards = make_rewards(config, self._say)  # first: a typing error should not cost a model
        model = load_model(config, on_step=self._announce_pretraining, on_message=self._say)
        _agree_on_attention(config, model, ranks)
        self.trainer = Trainer(
            config, model, rewards, should_stop=lambda: bool(self.stop), ranks=ranks
        )
        if ranks.lead:
            self.display = Display(config.train.updates, self.trainer.evaluations_per_update)
        else:
            self.display = Quiet(f"rank {ranks.rank}")
        self.trainer.on_phase = self.display.phase
        self.trainer.on_evaluations = self.display.advance
        self.trainer.on_message = self._say
        self._tell_what_is_odd()
        self.evaluations = Evaluations(run_dir, self.trainer, self._say)
        self.saved = 0  # update of the newest checkpoint that can be trusted
        self.finished = True  # its update's row stands in the log, evaluated if that was due

    def _tell_what_is_odd(self) -> None:
        config, ranks = self.trainer.config, self.ranks
        if ranks.lead and (
            self.trainer.policy.dtype == torch.bfloat16
            and config.model.lora.rank == 0
            and rounds_to_nearest(config.optimizer.name)
        ):
            self._say(
                "model.dtype is bfloat16, all weights are trained and optimizer.name is "
                f"{config.optimizer.name}: of a step, what is smaller than 1/512 of a weight is "
                f"rounded away, which at optimizer.lr {config.optimizer.lr:g} is most of it. "
                "Expect little to move; optimizer.name adamw8bit, model.dtype float32 or "
                "model.lora.rank > 0 trains as it should"
            )
        strategy = config.distributed.strategy
        if ranks.watch is None and strategy != "replicate":
            self._say(
                f"distributed.strategy is {strategy!r}, and this process is alone: it holds the "
                "whole model. torchrun starts several"
            )
        if ranks.lead and ranks.count > 1:
            self._say(f"{ranks.count} ranks, distributed.strategy {strategy}")

    def _say(self, text: str) -> None:
        """To whoever watches: above the progress, once there is one. Before, all ranks would say
        the same."""
        if self.display is not None:
            self.display.message(text)
        elif self.ranks.lead:
            print(text, flush=True)

    def _announce_pretraining(self, step: int, steps: int, loss: float) -> None:
        if step == 1:
            self._say("Pre-training the digits model by flow matching (once, then cached)")
        if step % 50 == 0 or step == steps:
            self._say(f"  step {step}/{steps}, loss {loss:.3f}")

    def train(self) -> int:
        with self.display, self.stop.listening(self.display):
            self._restore()
            config = self.trainer.config
            if self.ranks.lead:
                write_config(config, self.run_dir)  # not before: a resume may be refused
            first = self.trainer.updates + self.finished * (self.trainer.updates > 0)
            tracker = config.train.tracker if self.ranks.lead else None
            self.tracker = make_tracker(
                tracker, self.run_dir, config, first, on_message=self.display.message
            )
            try:
                self._train()
            finally:
                self.tracker.finish()
        if self.ranks.lead:
            self._conclude()
        return self.stop.exit_code

    def _train(self) -> None:
        """The loop, and whatever ended it, a checkpoint of what is complete. Several ranks write
        one together, so that where one has failed, the newest there is must do."""
        together = False
        try:
            self._loop()
            together = True
        except Interrupted:
            together = True  # the update in progress is left out
            self.stop.signal = self.stop.signal or signal.SIGTERM  # another has had it
        finally:
            if together or self.ranks.count == 1:
                self._save()

    def _restore(self) -> None:
        """Load the newest whole checkpoint, if there is one, and drop the rows that came after.

        Raises ConfigurationError when that is more updates than train.updates asks for.
        """
        trainer = self.trainer
        checkpoint = load_checkpoint(
            self.run_dir / "checkpoints", trainer.weights, trainer.improver.optimizer,
            with_average=trainer.average is not None, ranks=self.ranks,
        )  # fmt: skip
        if checkpoint is None:
            if self.ranks.lead and self.log.path.exists():
                self.display.message(
                    f"{self.run_dir} has no checkpoint yet: starting from the beginning"
                )
                self.log.path.unlink()
            return
        for skipped in checkpoint.skipped if self.ranks.lead else ():
            self.display.message(f"Checkpoint passed over, the one before it is used: {skipped}")
        if checkpoint.update > (updates := trainer.config.train.updates):
            raise ConfigurationError(
                f"train.updates is {updates}; expected at least {checkpoint.update}, the updates "
                f"that {self.run_dir} has made"
            )
        trainer.load_state_dict(checkpoint.state, checkpoint.weights, checkpoint.average)
        self.saved = checkpoint.update
        if self.ranks.lead:
            self._restore_rows(checkpoint.update)
        self.finished = self.ranks.from_lead(self.finished)

    def _restore_rows(self, update: int) -> None:
        """Those up to the checkpoint's."""
        # The newest row is written again, from the checkpoint, where it has yet to be evaluated:
        # that failed or was interrupted, or is due only now that this is the last update.
        row = next((r for r in self.log.rows() if r["update"] == update), {})
        self.finished = "seconds/evaluation" in row or (bool(row) and not self._evaluation_is_due())
        self.log.truncate(update if self.finished else update - 1)
        rows = self.log.rows()
        self.evaluations.resume(rows)
        self.display.resume(rows)
        self.display.warn(self._warning())
        self.display.message(f"Resuming after update {update}")

    def _loop(self) -> None:
        trainer, train = self.trainer, self.trainer.config.train
        if trainer.updates == 0:
            row = {"update": 0, "seconds": 0.0, "evaluations": 0}
            self._record(row | self.evaluations.evaluate(self.tracker))
        elif not self.finished:
            self._finish(trainer.row)
        while trainer.updates < train.updates and not self._is_to_end():
            self._finish(trainer.update())
            if trainer.updates % train.save_every == 0:
                self._save()
            skipped = trainer.skipped_in_a_row
            if skipped and skipped % train.max_skipped == 0:
                self._save()
                raise TrainingError(
                    f"the last {skipped} updates were skipped, since none had a finite loss and "
                    "gradient (train.max_skipped); look at the prompts named above, a lower "
                    "optimizer.lr, model.dtype float32. A checkpoint has the weights as they are"
                )

    def _is_to_end(self) -> bool:
        """Whether one of the ranks was asked to stop, or the watch over rewards has ended it."""
        if self.ranks.asked_to_stop and not self.stop:
            self.stop.signal = signal.SIGTERM  # another has had it
        return self.ranks.any(bool(self.stop) or bool(self.evaluations.ended))

    def _finish(self, row: dict[str, Any]) -> None:
        due = self._evaluation_is_due()
        self._record(row | self.evaluations.evaluate(self.tracker) if due else row)

    def _record(self, row: dict[str, Any]) -> None:
        if not self.ranks.lead:
            return
        self.log.append(row)
        self.display.warn(self._warning())
        self.display.row(row)
        self.tracker.log(row)

    def _warning(self) -> str:
        alarm = self.evaluations.alarm
        return "" if alarm is None else alarm.short

    def _evaluation_is_due(self) -> bool:
        number, train = self.trainer.updates, self.trainer.config.train
        return number % train.evaluate_every == 0 or number == train.updates

    def _save(self) -> None:
        """A checkpoint of the last complete update, unless there is one or weights are past it."""
        if self.trainer.updates == self.saved or self.trainer.midway:
            return
        self.display.phase("checkpoint")
        self.ranks.phase("checkpoint")
        average = self.trainer.average
        save_checkpoint(
            self.run_dir / "checkpoints",
            self.trainer.updates,
            self.trainer.weights,
            None if average is None else average.values,
            self.trainer.state_dict(),
            self.trainer.config.train.keep_last,
            self.ranks,
        )
        self.saved = self.trainer.updates

    def _conclude(self) -> None:
        if self.log.path.exists():
            write_report(self.run_dir)
            rows = self.log.rows()
            print(closing_line(rows, self.run_dir, hacking.sentence(rows)))
        if self.evaluations.ended and self.trainer.updates < self.trainer.config.train.updates:
            print(self.evaluations.ended)
        if self.stop:
            print(
                f"Stopped after update {self.trainer.updates}. "
                f"Go on with: g2rpo train --resume {self.run_dir}"
            )


def _agree_on_attention(config: Config, model: Model, ranks: Ranks) -> None:
    """One attention for all ranks, where each has measured for itself."""
    name = ranks.from_lead(config.model.attention)
    if name != config.model.attention:
        from .flux.attention import set_attention

        tokens = model.latent_shape[0] + config.data.max_sequence_length
        config.model.attention = set_attention(
            model.policy.transformer, name, config.rollout.branch_batch, tokens
        )
