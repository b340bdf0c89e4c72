"""Which attention is used: what was asked for, or what was measured to be fastest."""

import json

import pytest
import torch
from diffusers import FluxTransformer2DModel

from g2rpo.errors import ConfigurationError
from g2rpo.flux import attention
from g2rpo.flux.miniature import TRANSFORMER

CPU, SIZES = torch.device("cpu"), (2, 12, 2, 16)


@pytest.fixture
def transformer():
    return FluxTransformer2DModel(**TRANSFORMER).eval()


def used(transformer) -> set:
    return {block.attn.processor._attention_backend for block in transformer.transformer_blocks}


def test_cpus_leave_it_to_torch(transformer):
    assert attention.set_attention(transformer, "auto", 2, 12) == "native"
    assert used(transformer) == {"native"}


def test_the_one_that_was_asked_for(transformer, caplog):
    assert attention.set_attention(transformer, "math", 2, 12) == "math"
    assert used(transformer) == {"_native_math"} and not caplog.records


@pytest.mark.parametrize("name", ["cudnn", "flash-attn", "flash-attn-3"])
def test_one_that_does_not_run_here(transformer, name):
    with pytest.raises(ConfigurationError, match=f"attention is '{name}', which does not run"):
        attention.set_attention(transformer, name, 2, 12)


def test_attention_is_attention():
    """What is tried is what torch computes."""
    q, k, v = attention._inputs(SIZES, torch.float32, CPU)
    found = attention._attend("math", q, k, v)
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) / 4
    torch.testing.assert_close(found, torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v))
    assert attention.try_backend("math", SIZES, torch.float32, CPU) is None


def fastest(tmp_path, monkeypatch, times, messages=None):
    monkeypatch.setattr(attention, "try_backend", lambda name, *_: None if name in times else "no")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    measured = []

    def measure(name, *_):
        measured.append(name)
        return times[name]

    found = attention._fastest(
        SIZES, torch.bfloat16, CPU, (messages if messages is not None else []).append, tmp_path,
        measure,
    )  # fmt: skip
    return found, measured


def test_the_fastest_is_measured_once(tmp_path, monkeypatch):
    messages: list[str] = []
    times = {"cudnn": 2.0, "flash": 1.5, "math": 9.0}
    assert fastest(tmp_path, monkeypatch, times, messages) == ("flash", ["cudnn", "flash", "math"])
    assert messages == [
        "Attention: flash (at batch 2, 12 tokens: flash 1.50 ms, cudnn 2.00 ms, math 9.00 ms)"
    ]
    assert fastest(tmp_path, monkeypatch, {"cudnn": 1.0}) == ("flash", [])  # it is remembered
    file = tmp_path / attention.CACHE
    (key,) = json.loads(file.read_text())
    assert key.startswith(f"A GPU {torch.__version__}") and "torch.bfloat16" in key
    file.write_text("{")  # damaged: measured anew
    assert fastest(tmp_path, monkeypatch, {"cudnn": 1.0}) == ("cudnn", ["cudnn"])


def test_none_runs(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="none of cudnn, .* runs on"):
        fastest(tmp_path, monkeypatch, {})
