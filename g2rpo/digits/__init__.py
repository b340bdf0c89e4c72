"""The digits world: everything `g2rpo train digits` needs, small enough for a laptop's CPU.

1,797 real handwritten digits (scikit-learn's copy of the UCI scans), ten prompts, a FLUX of 0.3 M
parameters first trained on the scans by flow matching, a reward and a judge that never meet: the
reward classifier is fitted on one half of the scans, the judge on the other.

    scans.py    the scans and their two halves; pixels <-> latents; prompts -> embeddings
    model.py    the transformer, its pre-training and the cache that keeps the result
    rewards.py  classifier (the reward) and judges (only ever reported)
    variety.py  how different the images of a digit are, and how much of the scans they cover

Importing this package imports torch alone; scikit-learn and diffusers (seconds each) are imported
by the functions that need them.
"""

from g2rpo.digits.model import new_transformer, pretrain, pretrained_transformer, token_ids
from g2rpo.digits.rewards import (
    classifier_log_prob,
    classifier_probability,
    forest_probability,
    judge_accuracy,
    judge_probability,
)
from g2rpo.digits.scans import PROMPTS, embed_prompts, load_scans, pack, unpack
from g2rpo.digits.variety import coverage, pairwise_distance

__all__ = [
    "PROMPTS",
    "classifier_log_prob",
    "classifier_probability",
    "coverage",
    "embed_prompts",
    "forest_probability",
    "judge_accuracy",
    "judge_probability",
    "load_scans",
    "new_transformer",
    "pack",
    "pairwise_distance",
    "pretrain",
    "pretrained_transformer",
    "token_ids",
    "unpack",
]
