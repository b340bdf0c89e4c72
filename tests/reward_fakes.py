"""Rewards for tests of the configuration: functions, classes, small scorers in published files."""

from __future__ import annotations

from pathlib import Path

import torch
from open_clip_small import make_state, write_scorers

from g2rpo.config import Config, RewardConfig
from g2rpo.rewards.build import make_rewards


def write_small_scorers(folder: Path) -> Path:
    """hps, dfn, pick, laion: a folder each, of images of 224 x 224."""
    return write_scorers(folder, make_state(128, 64, layers=1, patch=56, resolution=224))


def write_cache(folder: Path) -> Path:
    """The rewards of FLUX's presets where they are looked for without a path: the folder is what
    platformdirs.user_cache_dir("g2rpo") gives. CLIP's vocabulary is left to the pipeline."""
    from test_reward_imagereward import write as write_imagereward

    small = write_small_scorers(folder / "small")
    for name, made_as, files in (
        ("hps-v2.1", "hps", ["HPS_v2.1_compressed.pt"]),
        ("clip-score-224", "dfn", ["open_clip_pytorch_model.bin"]),
        ("pickscore", "pick", ["config.json", "model.safetensors"]),
    ):
        place = folder / "rewards" / name
        place.mkdir(parents=True)
        for file in files:
            (small / made_as / file).rename(place / file)
    write_imagereward(folder / "rewards" / "imagereward")
    return folder


def config_of(*rewards: dict, path: str = "somewhere/flux") -> Config:
    """Of a run that trains a FLUX pipeline on these."""
    config = Config(rewards=[RewardConfig(**reward) for reward in rewards])
    config.model.path, config.model.device = path, "cpu"
    config.validate()
    return config


def made(*rewards: dict, path: str = "somewhere/flux", on_message=lambda text: None) -> list:
    """Of `Reward`."""
    return make_rewards(config_of(*rewards, path=path), on_message)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


class Fake:
    """A scorer that writes down what happens to it."""

    events: list[str] = []
    truncated_prompts = 3

    def __init__(self, device, power=1.0, path=None, dtype=torch.float32, name="fake"):
        self.given = device, power, path, dtype
        self.power, self.name, self.away = 1 / (1 / power), name, False  # 0 is an error

    def __call__(self, images, prompts):
        if self.away:
            self.events.append(f"{self.name} back")
        self.away = False
        return images.flatten(1).mean(1) ** self.power

    def offload(self):
        if not self.away:
            self.events.append(f"{self.name} away")
        self.away = True


class Bare:
    """Takes nothing, offloads nothing."""

    def __call__(self, images, prompts):
        return brightness(images, prompts)


class Anything:
    def __init__(self, needed, **others):
        self.others = {"needed": needed, **others}

    def __call__(self, images, prompts):
        return brightness(images, prompts)


class Mute:
    """Cannot be called."""

    def __init__(self, device):
        pass


class Plain(Bare):
    def __init__(self, device):
        pass


already_made = Fake("cpu")


def first_number(answer):
    return float(answer.split()[0])


def sometimes(images, prompts):
    """Every second image cannot be scored."""
    scores = brightness(images, prompts)
    scores[::2] = torch.nan
    return scores
