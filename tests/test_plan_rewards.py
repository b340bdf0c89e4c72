"""`g2rpo plan` on rewards: the scorers' sizes, where their weights are, and what is not counted."""

from __future__ import annotations

import json

import pytest
import torch
from plan_configs import config_of

from g2rpo import cli
from g2rpo.plan.cards import CARDS, GIB
from g2rpo.plan.memory import plan_memory
from g2rpo.plan.model import sizes_of
from g2rpo.plan.rewards import HEADS, PARAMETERS, scorers_of
from g2rpo.rewards.load import names
from g2rpo.rewards.open_clip_weights import Architecture, Tower


@pytest.fixture(scope="module")
def flux():
    return sizes_of(config_of("flux-dev-1gpu"))


def count(*models: torch.nn.Module) -> int:
    return sum(p.numel() for model in models for p in model.parameters())


def test_parameters_are_those_of_the_architectures():
    from transformers import (
        BlipTextConfig,
        BlipTextModel,
        BlipVisionConfig,
        BlipVisionModel,
        CLIPModel,
    )

    vision_h, text_h = Tower(1280, 32, 16, 5120), Tower(1024, 24, 16, 4096)
    vision_l, text_l = Tower(1024, 24, 16, 4096), Tower(768, 12, 12, 3072)
    with torch.device("meta"):
        huge, larger, large = (
            CLIPModel(Architecture(v, t, 14, size, 77, 49408, width).config("gelu"))
            for v, t, size, width in (
                (vision_h, text_h, 224, 1024), (vision_h, text_h, 378, 1024),
                (vision_l, text_l, 224, 768),
            )
        )  # fmt: skip
        seen = BlipVisionModel(BlipVisionConfig(
            hidden_size=1024, num_hidden_layers=24, intermediate_size=4096, patch_size=16,
            num_attention_heads=16, image_size=224,
        ))  # fmt: skip
        read = BlipTextModel(BlipTextConfig(
            vocab_size=30524, hidden_size=768, num_hidden_layers=12, intermediate_size=3072,
            num_attention_heads=12, max_position_embeddings=512, is_decoder=True,
            encoder_hidden_size=1024, bos_token_id=None, eos_token_id=None, sep_token_id=None,
        ), add_pooling_layer=False)  # fmt: skip
    assert count(large) == 427_616_513  # as OpenAI's ViT-L/14 has
    for name in ("hps-v2.1", "clip-score-224", "pickscore"):
        assert PARAMETERS[name] == count(huge)
    assert PARAMETERS["clip-score-378"] == count(larger)
    del large.text_model, large.text_projection  # as `load_aesthetic` does
    assert PARAMETERS["aesthetic"] == count(large)
    assert PARAMETERS["imagereward"] == count(seen, read)
    widths = (768, 1024, 128, 64, 16, 1)  # of LAION's and of ImageReward's last layers
    head = sum(into * out + out for into, out in zip(widths, widths[1:]))
    assert HEADS == {"aesthetic": head, "imagereward": head}
    assert list(PARAMETERS) == names()


def test_offloaded_scorers_are_there_while_they_score(flux):
    config = config_of("flux-dev-1gpu")
    memory = plan_memory(config, flux)
    row = {row.name: row.bytes for row in memory.rows}["reward models"]
    trained = 2 * 2 * PARAMETERS["hps-v2.1"]
    assert {p: n for p, n in row.items() if n} == {"rewards": trained}
    heldout = 2 * (PARAMETERS["pickscore"] + PARAMETERS["imagereward"]) + 4 * HEADS["imagereward"]
    assert dict(memory.host)["reward models"] == trained + heldout
    assert 6.2 < (trained + heldout) / GIB < 6.4
    for reward in config.rewards:
        reward.offload = False
    staying = plan_memory(config, flux)
    assert "reward models" not in dict(staying.host)
    for phase in ("load", "anchor", "completions", "backward", "step"):
        assert staying.totals[phase] - memory.totals[phase] == trained + heldout
    assert staying.peak > CARDS["h100-80gb"].usable > memory.peak


def test_dtype_counts(flux):
    config = config_of("flux-dev-1gpu")
    half = scorers_of(config)
    for reward in config.rewards:
        reward.dtype = "float32"
    assert scorers_of(config).visiting == 2 * half.visiting


def test_offload_is_among_the_switches(capsys):
    rewards = [{"name": "hps-v2.1"}, {"name": "pickscore", "heldout": True}, {"name": "mine:f"}]
    arguments = ["plan", "flux-dev-1gpu", "--gpu", "h100-80gb", "--rewards", json.dumps(rewards)]
    assert cli.main([*arguments, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    switch = next(s for s in plan["switches"] if s["change"] == "--rewards with offload: true")
    assert switch["fits"]
    assert plan["peak"] - switch["peak"] == 2 * 4 * PARAMETERS["hps-v2.1"]
    assert plan["memory"]["rewards_not_counted"] == ["f"]
    assert cli.main(arguments) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "reward models" in out and "What f may need is not counted." in out


def test_a_judge_needs_nothing_here(flux):
    judge = {"name": "judge", "path": "http://h:1/v1", "options": {"model": "m"}}
    config = config_of("flux-lora", "--rewards", json.dumps([judge]))
    found = scorers_of(config)
    assert (found.staying, found.visiting, found.host, found.unknown) == (0, 0, 0, ())
    assert "reward models" not in [row.name for row in plan_memory(config, flux).rows]
