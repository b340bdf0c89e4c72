"""A run: the trainer with everything a person wants around it.

    runs/digits-20260101-120000/
        config.yaml      the resolved configuration
        metrics.jsonl    a row an update
        samples/         grids of the same noises at every evaluation
        checkpoints/     step-000010/ ...
        curves.png, report.html

`start` begins a run in a new directory; `resume` goes on from its newest whole checkpoint, as if
nothing had happened: weights, optimizer and draws are bit for bit those of an undisturbed run.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import yaml

from .checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from .config import Config, ConfigurationError
from .models import load_model
from .report import sample_path, write_grid, write_report
from .rewards import Reward, import_reward, reward_name
from .tracking import Display, MetricsLog, closing_line
from .trainer import Interrupted, Trainer

CONTENTS = ("config.yaml", "metrics.jsonl", "curves.png", "report.html", "samples", "checkpoints")
GRID_IMAGES = 80  # of an evaluation's images, the most that a grid shows


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to stop at the next safe point; a second Ctrl-C insists."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal is not None else 0

    @contextmanager
    def listening(self, display: Display) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread only
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self:
                raise KeyboardInterrupt
            self.signal = number
            name = signal.Signals(number).name
            display.message(f"{name}: stopping with a checkpoint; once more to stop at once")

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def holds_run(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in CONTENTS)


def start(config: Config, run_dir: Path, *, overwrite: bool = False) -> int:
    """Train from the beginning in `run_dir`. Returns an exit code: 0, or 128 + signal.

    Raises ConfigurationError when run_dir holds another run, unless overwrite removes that first.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigurationError(f"train.output is {str(run_dir)!r}, a file; expected a directory")
    if holds_run(run_dir):
        if not overwrite:
            raise ConfigurationError(
                f"train.output is {str(run_dir)!r}, which holds another run; expected a new "
                f"directory, or --overwrite, or `g2rpo train --resume {run_dir}`"
            )
        for name in CONTENTS:
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config, run_dir)
    return _train(config, run_dir)


def resume(config: Config, run_dir: Path) -> int:
    """Go on with the run in `run_dir`; config is its own, with what may change changed."""
    write_config(config, run_dir)
    return _train(config, run_dir)


def write_config(config: Config, run_dir: Path) -> None:
    values = asdict(config)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    partial = run_dir / ".config.yaml.partial"
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    partial.rename(run_dir / "config.yaml")


def make_rewards(config: Config) -> list[Reward]:
    names = [reward.name for reward in config.rewards]
    return [
        Reward(reward_name(r.name, names), import_reward(r.name), r.weight, r.heldout)
        for r in config.rewards
    ]


def _train(config: Config, run_dir: Path) -> int:
    rewards = make_rewards(config)  # before the model: a mistyped name should not cost its loading
    stop, log = StopRequest(), MetricsLog(run_dir / "metrics.jsonl")
    model = load_model(config, on_step=_announce_pretraining)
    trainer = Trainer(config, model, rewards, should_stop=lambda: bool(stop))
    display = Display(config.train.updates, trainer.evaluations_per_update)
    trainer.on_phase, trainer.on_evaluations = display.phase, display.advance
    with display, stop.listening(display):
        _restore(trainer, run_dir, log, display)
        try:
            _loop(trainer, run_dir, log, display, stop)
        except Interrupted:
            pass  # the update in progress is left out; what is complete is saved below
        except Exception:
            _save(trainer, run_dir)  # an update that raised has changed nothing: lose nothing
            raise
        _save(trainer, run_dir)
    rows = log.rows() if log.path.exists() else []
    if rows:
        write_report(run_dir)
        print(closing_line(rows, run_dir))
    if stop:
        print(f"Stopped after update {trainer.updates}. Go on with: g2rpo train --resume {run_dir}")
    return stop.exit_code


def _restore(trainer: Trainer, run_dir: Path, log: MetricsLog, display: Display) -> None:
    """Load the newest whole checkpoint, if the run has one, and drop rows that came after it."""
    checkpoint = load_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        if log.path.exists():
            display.message(f"{run_dir} has no checkpoint yet: starting from the beginning")
            log.path.unlink()
        return
    for skipped in checkpoint.skipped:
        display.message(f"Checkpoint passed over, the one before it is used: {skipped}")
    trainer.load_state_dict(checkpoint.state, checkpoint.weights)
    log.truncate(checkpoint.update)
    display.resume(log.rows())
    display.message(f"Resuming after update {checkpoint.update}")


def _loop(
    trainer: Trainer, run_dir: Path, log: MetricsLog, display: Display, stop: StopRequest
) -> None:
    train = trainer.config.train
    if trainer.updates == 0 and not log.path.exists():
        row = {"update": 0, "seconds": 0.0, "evaluations": 0, **_evaluate(trainer, run_dir)}
        log.append(row)
        display.row(row)
    while trainer.updates < train.updates and not stop:
        row = trainer.update()
        number = trainer.updates
        if number % train.evaluate_every == 0 or number == train.updates:
            row |= _evaluate(trainer, run_dir)
        log.append(row)
        display.row(row)
        if number % train.save_every == 0:
            _save(trainer, run_dir)


def _evaluate(trainer: Trainer, run_dir: Path) -> dict[str, float]:
    row, images, prompts = trainer.evaluate()
    (run_dir / "samples").mkdir(exist_ok=True)
    shown = slice(0, GRID_IMAGES)
    write_grid(images[shown], prompts[shown], sample_path(run_dir / "samples", trainer.updates))
    return row


def _save(trainer: Trainer, run_dir: Path) -> None:
    """A checkpoint of the last complete update, unless it is there already."""
    folder = run_dir / "checkpoints"
    saved = list_checkpoints(folder)
    if trainer.updates == 0 or (saved and saved[-1].name == f"step-{trainer.updates:06d}"):
        return
    save_checkpoint(
        folder,
        trainer.updates,
        trainer.policy.transformer,
        trainer.state_dict(),
        trainer.config.train.keep_last,
    )


def _announce_pretraining(step: int, steps: int, loss: float) -> None:
    if step == 1:
        print("Pre-training the digits model by flow matching (once; then it is cached)", flush=True)
    if step % 50 == 0 or step == steps:
        print(f"  step {step}/{steps}, loss {loss:.3f}", flush=True)
