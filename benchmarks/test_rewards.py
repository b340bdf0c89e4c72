"""A CLIP scorer under pytest-benchmark, beside the way the published scorers are called.

    pytest benchmarks -k reward --benchmark-only

24 images of 512 x 512 and two prompts, 12 branches each, on a small random CLIP. The others' way
(hpsv2's img_score, MixGRPO's and DanceGRPO's rewards) takes an image at a time off the device:
tensor, PIL, resize, tensor, a forward of both towers. Ours takes all of them at once and encodes a
prompt once, none of them before: its cache is emptied first. Both give the same scores.

Two models, both of 12 layers a tower. In "calls" an image is 17 tokens 64 wide and a text 77 tokens
256 wide: there, as on a GPU, an image alone costs its calls and its text more than its arithmetic.
"arithmetic" has widths in the proportion of ViT-B/32, 192 and 128, and its 50 tokens an image: on a
CPU the images' own multiplications are most of the work there, and no batch saves those.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_small import make_state, write_tokenizer
from PIL import Image
from sklearn.datasets import load_sample_images
from timing import interleave, ratio, synchronizer
from torch import Tensor

from g2rpo.rewards.clip import ClipScorer
from g2rpo.rewards.load import load
from g2rpo.rewards.preprocess import OPENAI_MEAN, OPENAI_STD

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

OURS, THEIRS = "ours", "one at a time"
PROMPTS = ["a golden retriever leaping on green grass"] * 12 + ["a flower in the evening sun"] * 12
MODELS = {
    "calls": {"vision_width": 64, "text_width": 256, "patch": 56},
    "arithmetic": {"vision_width": 192, "text_width": 128, "patch": 32},
}
GOALS = {"calls": 5.0}  # times as fast
ROUNDS, BUDGET = 5, 30.0  # seconds


def make_images(device: str, count: int) -> Tensor:  # [count, 3, 512, 512] in [0, 1]
    """Different parts of two photographs, enlarged."""
    images = []
    for i in range(count):
        photograph = load_sample_images().images[i % 2]
        part = torch.from_numpy(photograph[8 * i : 8 * i + 240, 16 * i : 16 * i + 240].copy())
        part = part.permute(2, 0, 1)[None] / 255
        images.append(F.interpolate(part, (512, 512), mode="bicubic").clamp(0, 1))
    return torch.cat(images).to(device)


@torch.no_grad()
def one_at_a_time(scorer: ClipScorer, images: Tensor, prompts: list[str]) -> Tensor:
    """The others' loop, on the same model and tokenizer."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_MEAN, OPENAI_STD))
    scores = []
    for image, prompt in zip(images, prompts):
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        small = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
        tensor = torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255
        tensor = ((tensor - mean) / std)[None].to(image.device)
        ids = scorer.tokens([prompt]).ids.to(image.device)
        out = scorer.model(input_ids=ids, pixel_values=tensor)
        scores.append((out.image_embeds * out.text_embeds).sum().item())
    return torch.tensor(scores)


@pytest.mark.benchmark(group="rewards")
@pytest.mark.parametrize("name", MODELS)
def test_reward_batched(
    name: str, benchmark, device: str, toy: bool, tmp_path: Path
) -> None:
    prompts = PROMPTS[10:14] if toy else PROMPTS
    state = make_state(layers=1 if toy else 12, resolution=224, **MODELS[name])
    torch.save(state, tmp_path / "HPS_v2.1_compressed.pt")
    write_tokenizer(tmp_path / "tokenizer")
    scorer, images = load("hps-v2.1", tmp_path, device=device), make_images(device, len(prompts))
    synchronize = synchronizer(device)

    def ours() -> Tensor:
        scorer._texts.clear()
        return scorer(images, prompts)

    def timed(way: Callable[[], Tensor]) -> float:
        synchronize()
        began = time.perf_counter()
        way()
        synchronize()
        return time.perf_counter() - began

    ways = {OURS: ours, THEIRS: lambda: one_at_a_time(scorer, images, prompts)}
    apart = (ours().cpu() - ways[THEIRS]()).abs().max().item()
    assert apart <= 1e-3
    blocks = {key: lambda way=way: timed(way) for key, way in ways.items()}
    seconds = interleave(blocks, ROUNDS, BUDGET)
    times = ratio(seconds[THEIRS], seconds[OURS])
    benchmark.extra_info.update(
        seconds={key: statistics.median(values) for key, values in seconds.items()},
        times_as_fast=times, score_difference=apart, threads=torch.get_num_threads(),
    )  # fmt: skip
    benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=1)
    goal = 0.0 if toy else GOALS.get(name, 1.0)
    assert times["median"] >= goal, f"{times} times as fast as one at a time; expected {goal}"
