"""Weights of the published scorers, in bytes, and which rewards are not counted."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Config
from ..rewards import short_names

# Parameters in the scorer's dtype, as transformers counts the architectures; tests/test_plan.py
# counts them again. A judge is served elsewhere and has none here.
CLIP_H = 986_109_441  # open_clip's ViT-H-14 at 224 x 224
PARAMETERS = {
    "hps-v2.1": CLIP_H,
    "clip-score-224": CLIP_H,
    "clip-score-378": 986_714_881,
    "pickscore": CLIP_H,
    "aesthetic": 303_966_209,  # OpenAI's ViT-L/14 without its text tower
    "imagereward": 445_278_720,  # BLIP's ViT-L/16 and BERT with cross attention
    "judge": 0,
}
# And in float32 whatever the dtype: the layers from 768 features to a score.
HEADS = dict.fromkeys(("aesthetic", "imagereward"), 927_969)


@dataclass(frozen=True)
class Scorers:
    """Bytes of weights of all rewards that are known."""

    staying: int  # always on the GPU
    visiting: int  # while an update's images are scored
    host: int  # in host memory otherwise
    unknown: tuple[str, ...]  # short names of rewards of the user's, which are not counted


def scorers_of(config: Config) -> Scorers:
    """Held-out ones that are offloaded come to the GPU in evaluations alone."""
    names = short_names([r.name for r in config.rewards], [r.label for r in config.rewards])
    staying = visiting = host = 0
    unknown = []
    for reward, name in zip(config.rewards, names):
        if reward.name not in PARAMETERS:
            unknown.append(name)
            continue
        itemsize = {"float32": 4, "bfloat16": 2}[reward.dtype]
        count = itemsize * PARAMETERS[reward.name] + 4 * HEADS.get(reward.name, 0)
        if not reward.offload:
            staying += count
            continue
        host += count
        visiting += 0 if reward.heldout else count
    return Scorers(staying, visiting, host, tuple(unknown))
