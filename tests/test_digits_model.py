"""The digits transformer: pre-training, and the cache that keeps its result."""

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from g2rpo import digits
from g2rpo.digits import model

QUICK = {"steps": 2, "batch_size": 4, "seed": 0}

def weights(transformer: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in transformer.parameters()])


# Transformer and pre-training


def test_new_transformer():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    transformer = digits.new_transformer(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(weights(transformer), weights(digits.new_transformer(0)))
    assert not torch.equal(weights(transformer), weights(digits.new_transformer(1)))
    assert weights(transformer).numel() == 311_684

    text_ids, image_ids = digits.token_ids()
    assert text_ids.tolist() == [[0, 0, 0]]
    assert image_ids.tolist() == [[0, row, column] for row in range(4) for column in range(4)]
    prompt_embeds, pooled = digits.embed_prompts(["three", "four"])
    velocity = transformer(
        hidden_states=torch.zeros(2, 16, 4),
        timestep=torch.tensor([1.0, 0.5]),
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]
    assert velocity.shape == (2, 16, 4)


def test_pretraining_lowers_the_loss():
    transformer = digits.new_transformer(0)
    seen: list[tuple[int, int, float]] = []
    digits.pretrain(transformer, steps=60, batch_size=32, on_step=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(step, 60) for step in range(1, 61)]
    losses = torch.tensor([step[2] for step in seen])
    # A model that predicts zero velocity scores E|noise|² + E|x0|², about 1.7.
    assert losses[:5].mean() > 1.5 and losses[-10:].mean() < 0.75
    assert all(parameter.grad is None for parameter in transformer.parameters())


def test_pretraining_is_decided_by_its_arguments():
    def trained(global_seed: int, **changes: int) -> Tensor:
        transformer = digits.new_transformer(0)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        digits.pretrain(transformer, **{**QUICK, **changes})
        assert torch.equal(torch.get_rng_state(), before)
        return weights(transformer)

    assert torch.equal(trained(1), trained(2))
    for changes in ({"seed": 1}, {"steps": 3}, {"batch_size": 5}):
        assert not torch.equal(trained(1), trained(1, **changes))


def test_pretraining_does_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            transformer = digits.new_transformer(0)
            digits.pretrain(transformer, steps=2, batch_size=64)
            results.append(weights(transformer))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_pretraining_refuses():
    transformer = digits.new_transformer(0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        digits.pretrain(transformer, steps=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        digits.pretrain(transformer, batch_size=-1)
    with torch.no_grad():
        transformer.proj_out.weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="non-finite"):
        digits.pretrain(transformer, **QUICK)


# Cache


def cached(folder: Path, **changes: int) -> tuple[Tensor, int]:
    """(weights, training steps it took)"""
    steps: list[int] = []
    transformer = digits.pretrained_transformer(
        folder, on_step=lambda step, *_: steps.append(step), **{**QUICK, **changes}
    )
    return weights(transformer), len(steps)


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.filterwarnings("error")
def test_cache_trains_once(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    expected = digits.new_transformer(0)
    digits.pretrain(expected, **QUICK)
    first, first_steps = cached(tmp_path / "made" / "on demand")
    second, second_steps = cached(tmp_path / "made" / "on demand")
    assert (first_steps, second_steps) == (2, 0)
    assert torch.equal(first, weights(expected)) and torch.equal(second, first)
    assert torch.equal(torch.get_rng_state(), before)


def test_cache_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("G2RPO_CACHE", str(tmp_path / "theirs"))
    digits.pretrained_transformer(**QUICK)
    assert len(entries(tmp_path / "theirs")) == 1
    digits.pretrained_transformer(tmp_path / "argument", **QUICK)  # the argument comes first
    assert len(entries(tmp_path / "argument")) == 1
    monkeypatch.delenv("G2RPO_CACHE")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path / name))
    digits.pretrained_transformer(**QUICK)
    assert len(entries(tmp_path / "g2rpo")) == 1


def test_cache_never_serves_another_recipe(tmp_path, monkeypatch):
    cached(tmp_path)
    for changes in ({"seed": 1}, {"steps": 3}, {"batch_size": 5}):
        assert cached(tmp_path, **changes)[1] > 0
    monkeypatch.setitem(model.RECIPE, "version", model.RECIPE["version"] + 1)
    assert cached(tmp_path)[1] == 2
    monkeypatch.setitem(model.ARCHITECTURE, "num_single_layers", 1)
    assert cached(tmp_path)[0].numel() < 311_684
    assert len(entries(tmp_path)) == 6


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, name, message",
    [
        (truncate, "diffusion_pytorch_model.safetensors", "do not match SHA256SUMS"),
        (flip_a_bit, "diffusion_pytorch_model.safetensors", "do not match SHA256SUMS"),
        (truncate, "config.json", "do not match SHA256SUMS"),
        (Path.unlink, "config.json", "config.json is missing"),
        (Path.unlink, "SHA256SUMS", "SHA256SUMS is missing"),
    ],
)
def test_cache_rebuilds_a_damaged_entry(tmp_path, damage, name, message):
    expected, _ = cached(tmp_path)
    [entry] = entries(tmp_path)
    damage(entry / name)
    with pytest.warns(UserWarning, match=f"{entry.name} is rebuilt: .*{message}"):
        rebuilt, steps = cached(tmp_path)
    assert steps == 2 and torch.equal(rebuilt, expected)
    assert entries(tmp_path) == [entry]
    assert cached(tmp_path)[1] == 0


@pytest.mark.filterwarnings("error")
def test_a_killed_run_leaves_no_entry(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        digits.pretrained_transformer(tmp_path, on_step=kill, **QUICK)
    assert entries(tmp_path) == []
    with monkeypatch.context() as patch:  # killed between saving and renaming
        patch.setattr(model, "_checksums", kill)
        with pytest.raises(Killed):
            cached(tmp_path)
    [leftover] = entries(tmp_path)
    assert leftover.suffix == ".new"
    assert cached(tmp_path)[1] == 2  # without a warning: nothing was damaged
    [entry] = entries(tmp_path)
    assert entry == leftover.with_suffix("")


def test_concurrent_runs_train_once(tmp_path):
    results: list[tuple[Tensor, int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(cached(tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(steps for _, steps in results) == [0, 0, 2]
    assert all(torch.equal(found, results[0][0]) for found, _ in results)
