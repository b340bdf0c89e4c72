"""The evaluation of a run's checkpoint, beside the policy that the run began with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..config import Config
from ..metrics import duration
from ..models import choose_device
from ..rewards import Reward
from ..scoring import diversity
from .files import BASE_IMAGES, IMAGES, common_facts
from .policies import Drawn, draw_run
from .result import Evaluation
from .scores import Batch, score_sources
from .settings import marks


def evaluate_run(
    run: Config,
    config: Config,
    rewards: Sequence[Reward],
    run_dir: Path,
    checkpoint: Path,
    ema: bool,
    samples: int,
    output: Path,
    console: Console,
) -> Evaluation:
    """Draw, score, and compare with the base. config: of the evaluation; run: of the run."""
    batch = Batch(config.rollout.branch_batch, lambda text: console.out(text, highlight=False))
    folders = output / BASE_IMAGES, output / IMAGES
    for folder in folders:
        folder.mkdir(exist_ok=True)
    drawn = draw_run(config, checkpoint, ema, samples, folders, batch, console)
    batch.size = config.rollout.branch_batch  # without the model there is room again
    every = range(len(drawn.prompts))
    sources = [[(every, images.pixels)] for images in (drawn.base, drawn.policy)]
    device = choose_device(config.model.device)
    base, policy = score_sources(sources, drawn.prompts, rewards, batch, device, console)
    repeated = len(set(drawn.prompts)) < len(drawn.prompts)
    spreads = [
        diversity(images.pixels, drawn.prompts) if repeated else None
        for images in (drawn.base, drawn.policy)
    ]
    heldout, trained = marks(config.rewards, run)
    return Evaluation(
        name=f"{run_dir.resolve().name}, {checkpoint.name}{', moving average' if ema else ''}",
        prompts=drawn.prompts,
        rewards=[reward.name for reward in rewards],
        heldout=heldout,
        trained=trained,
        scores=policy,
        images=[file.relative_to(output) for file in drawn.policy.files],
        base_name=f"{Path(config.model.path).name} before training",
        base_scores=base,
        base_images=[file.relative_to(output) for file in drawn.base.files],
        diversity=spreads[1],
        base_diversity=spreads[0],
        facts=_run_facts(config, drawn, ema, spreads),
    )


def _run_facts(
    config: Config, drawn: Drawn, ema: bool, spreads: Sequence[float | None]
) -> dict[str, object]:
    different = list(dict.fromkeys(drawn.prompts))
    if drawn.trained_on is None:
        known = "whether they were trained on is not known: the checkpoint has no training state"
    else:
        seen = len(set(different) & set(drawn.trained_on))
        known = "none trained on" if not seen else f"{seen:,} of them trained on"
        known = "all trained on" if seen == len(different) else known
    images, rollout = drawn.policy.pixels, config.rollout
    size = " x ".join(str(side) for side in images.shape[2:])
    facts: dict[str, object] = {
        "Prompts": f"{len(different):,}, {known}",
        "Images": f"{len(images):,} of each policy, {size} pixels, from the same noises",
        "Sampling": f"{rollout.steps} steps, shift {rollout.shift:g}, guidance "
        f"{rollout.guidance:g}; drawn in {duration(drawn.seconds)}",
    }
    if drawn.has_average and not ema:
        facts["Weights"] = "as trained; evaluations in training are of their moving average (--ema)"
    return facts | common_facts(*spreads)
