"""FLUX from prompts to pictures: embed, train, go on, sample, on the miniature folder."""

import json
import shlex
import time
from pathlib import Path

import pytest
import torch
from flux_small import PROMPTS, write_run
from PIL import Image
from reward_fakes import write_cache
from safetensors import safe_open
from safetensors.torch import load_file

from g2rpo import cli

FULL = {"lora": {"rank": 0}, "dtype": "float32"}


def g2rpo(*arguments: object, code: int = 0) -> None:
    assert cli.main([str(argument) for argument in arguments]) == code


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(row: dict) -> dict:
    return {k: v for k, v in row.items() if "second" not in k and "memory" not in k}


def files_of(run_dir: Path, update: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's .safetensors files."""
    folder = run_dir / "checkpoints" / f"step-{update:06d}"
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        name = file.relative_to(folder)
        found |= {f"{name}: {key}": value for key, value in load_file(file).items()}
    return found


def assert_same_run(a: Path, b: Path, update: int) -> None:
    first, second = files_of(a, update), files_of(b, update)
    assert first.keys() == second.keys() and first
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert [timeless(row) for row in rows(a)] == [timeless(row) for row in rows(b)]


def test_the_whole_path(tmp_path, miniature, capsys):
    """With adapters and stored embeddings, in less than two minutes; a run that is cut in two and
    embeds as it goes is the same run, bit for bit."""
    began = time.monotonic()
    config = write_run(tmp_path, miniature)
    stored = ("--data.embeddings", tmp_path / "embeddings")
    g2rpo("embed", config, *stored)
    out = " ".join(capsys.readouterr().out.split())
    assert "5 of 5 prompts will be used by 3 updates" in out

    straight, cut = tmp_path / "straight", tmp_path / "cut"
    g2rpo("train", config, *stored, "--train.output", straight, "--train.tracker", "tensorboard")
    said = capsys.readouterr()
    assert "Loading the text encoders" not in said.out and "torchvision" not in said.out + said.err
    assert [row["update"] for row in rows(straight)] == [0, 1, 2, 3]
    assert all(row["ratio_max"] == 1.0 and row["grad_norm"] > 0 for row in rows(straight)[1:])
    g2rpo("train", config, "--train.output", cut, "--train.updates", 2, "--train.evaluate_every", 9)
    g2rpo("train", "--resume", cut, "--train.updates", 3)
    assert rows(cut)[3]["reward/warmth/mean"] == rows(straight)[3]["reward/warmth/mean"]
    assert timeless(rows(cut)[1]) == timeless(rows(straight)[1])
    first, second = files_of(straight, 3), files_of(cut, 3)
    assert all(torch.equal(first[name], second[name]) for name in first) and first

    capsys.readouterr()
    size = ("--height", 32, "--width", 48, "--steps", 4)
    g2rpo("sample", straight, "--prompt", PROMPTS[0], *size)
    assert "load_lora_weights" in capsys.readouterr().out
    (picture,) = (straight / "samples-step-000003").glob("*.png")
    assert Image.open(picture).size == (48, 32)
    (lora,) = (straight / "checkpoints" / "step-000003" / "lora").iterdir()
    with safe_open(lora, "pt") as file:
        assert '"transformer.lora_alpha": 8' in file.metadata()["lora_adapter_metadata"]
    seconds = time.monotonic() - began
    assert seconds < 120
    print(f"embed, train, resume and sample took {seconds:.1f} s")


def test_what_a_tracker_was_told(tmp_path, miniature):
    """Of a run that was cut: every update once, and the grids of samples."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = write_run(tmp_path, miniature, train={"tracker": "tensorboard", "evaluate_every": 1})
    run = tmp_path / "run"
    g2rpo("train", config, "--train.output", run, "--train.updates", 2)
    g2rpo("train", "--resume", run, "--train.updates", 3)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for key in ("reward/warmth/mean", "grad_norm", "evaluations_per_second", "ratio_max"):
        expected = {row["update"]: row[key] for row in rows(run) if key in row}
        found = {event.step: event.value for event in events.Scalars(key)}
        assert found == pytest.approx(expected, rel=1e-6), key
        assert len(events.Scalars(key)) == len(found), key
    assert [event.step for event in events.Images("samples")] == [0, 1, 2, 3]


def test_the_commands_of_the_readme(tmp_path, miniature, monkeypatch, capsys):
    """As they stand there, on the miniature's model and sizes; the preset's rewards are small ones
    in their published formats, in the user's cache."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    cache = write_cache(tmp_path / "cache")
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(cache))
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    section = readme.partition("## Train FLUX.1-dev")[2].partition("```bash")[2].partition("```")[0]
    lines = section.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("g2rpo")]
    assert [command[0] for command in commands] == ["embed", "train", "train", "sample"]
    small = {
        "embed": ["--model.path", str(miniature), "--train.updates", "1"],
        "train": [
            "--model.path", str(miniature), "--train.updates", "1", "--rollout.height", "32",
            "--rollout.width", "32", "--train.evaluation_samples", "2", "--rollout.steps", "6",
            "--rollout.sde_positions", "[0,1]", "--rollout.group_size", "4",
        ],
        "sample": ["--steps", "2", "--height", "32", "--width", "32"],
    }  # fmt: skip
    for name, *arguments in commands:
        again = ["--train.updates", "2"]  # or it would find the run finished
        g2rpo(name, *arguments, *(again if "--resume" in arguments else small[name]))
    found = rows(Path("runs/flux"))
    assert [row["update"] for row in found] == [0, 1, 2]
    for name in ("hps-v2.1", "clip-score-224"):
        assert found[2][f"rollout/{name}/std"] > 0 and found[2][f"rollout/{name}/failed"] == 0
        assert found[2][f"reward/{name}/std"] > 0
    for name in ("pickscore", "imagereward"):
        assert found[2][f"heldout/{name}/std"] > 0 and f"rollout/{name}/std" not in found[2]
    assert len(list(Path("runs/flux/samples-step-000002").glob("*.png"))) == 2
    assert "pipe.load_lora_weights" in capsys.readouterr().out


def test_all_weights_from_a_file_with_everything_on(tmp_path, miniature):
    """Full fine-tuning from one file of weights, an average, a KL term, gradient checkpointing; the
    checkpoint starts the next run."""
    config = write_run(
        tmp_path, miniature,
        model={**FULL, "gradient_checkpointing": True},
        optimizer={"lr": 1e-3}, objective={"kl": 0.01}, train={"ema": 0.5, "updates": 2},
    )  # fmt: skip
    first = tmp_path / "first"
    g2rpo("train", config, "--train.output", first)
    last = rows(first)[-1]
    assert last["ratio_max"] == 1.0 and last["kl"] > 0
    assert "images/diversity/mean" not in last, "five prompts, five images: nothing to compare"
    folder = first / "checkpoints" / "step-000002"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "manifest.json", "training_state.pt",
        "optimizer/shard-00001-model-00001-of-00001.safetensors",
        "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "ema/config.json", "ema/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    assert not torch.equal(
        load_file(weights)["x_embedder.weight"],
        load_file(folder / "ema" / weights.name)["x_embedder.weight"],
    )
    second = tmp_path / "second"
    g2rpo("train", config, "--train.output", second, "--model.transformer", weights,
          "--train.updates", 1, "--train.ema", "null")  # fmt: skip
    # The evaluation at its update 0 is of the weights it was given.
    plain = tmp_path / "plain"
    g2rpo("train", config, "--train.output", plain, "--train.updates", 1)
    assert rows(second)[0]["reward/warmth/mean"] != rows(plain)[0]["reward/warmth/mean"]


def test_the_preset_of_one_card(tmp_path, miniature):
    """Its optimizer, its offload, fused blocks, FP8 completions; and a run that is cut in two."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    small = [
        "--model.path", miniature, "--data.prompts", tmp_path / "prompts.txt",
        "--data.max_sequence_length", 64, "--rewards", '[{"name": "flux_small:warmth"}]',
        "--rollout.height", 32, "--rollout.width", 32, "--rollout.steps", 5,
        "--rollout.sde_positions", "[0,1]", "--rollout.group_size", 3,
        "--optimizer.lr", 1e-3, "--train.prompts_per_update", 2, "--train.evaluation_samples", 2,
        "--train.save_every", 1,
    ]  # fmt: skip
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    g2rpo("train", "flux-dev-1gpu", *small, "--train.updates", 3, "--train.output", straight)
    g2rpo("train", "flux-dev-1gpu", *small, "--train.updates", 1, "--train.output", cut)
    g2rpo("train", "--resume", cut, "--train.updates", 3)
    found = rows(straight)
    assert all(row["ratio_max"] == 1.0 and row["grad_norm"] > 0 for row in found[1:])
    weights, again = files_of(straight, 3), files_of(cut, 3)
    assert weights and all(torch.equal(weights[name], again[name]) for name in weights)
    mine = [value for name, value in weights.items() if name.startswith("transformer/")]
    assert mine and all(value.dtype is torch.bfloat16 for value in mine)
    before = files_of(straight, 2)
    assert any(not torch.equal(weights[name], before[name]) for name in weights)


def test_training_moves_the_reward(tmp_path, miniature):
    config = write_run(
        tmp_path, miniature, model=FULL, optimizer={"lr": 1e-2},
        rollout={"steps": 8, "sde_positions": [0, 1, 2, 3], "group_size": 8},
        train={"updates": 4, "evaluate_every": 4, "save_every": 4, "evaluation_samples": 15},
    )  # fmt: skip
    g2rpo("train", config, "--train.output", tmp_path / "run")
    before, after = rows(tmp_path / "run")[0], rows(tmp_path / "run")[-1]
    assert after["reward/warmth/mean"] > before["reward/warmth/mean"] + 0.02
    assert before["images/diversity/mean"] > 0


def test_bfloat16_in_full_is_warned_of(tmp_path, miniature, capsys):
    config = write_run(tmp_path, miniature, model={"lora": {"rank": 0}}, train={"updates": 1})
    g2rpo("train", config, "--train.output", tmp_path / "run", "--optimizer.lr", 2e-6)
    out = " ".join(capsys.readouterr().out.split())
    assert "model.dtype is bfloat16" in out and "rounded away" in out


MISTAKES = {
    "no prompts": (["--data.prompts", "null"], "data.prompts is null"),
    "no such model": (["--model.path", "no/such/folder"], "model.path is 'no/such/folder'"),
    "height": (["--rollout.height", "40"], "rollout.height is 40"),
    "no store": (["--data.embeddings", "nowhere"], "nowhere"),
    "weights": (["--model.transformer", "nowhere.safetensors"], "nowhere.safetensors"),
    "targets": (["--model.lora.targets", "[to_nothing]"], "model.lora.targets is ['to_nothing']"),
}


@pytest.mark.parametrize("arguments, said", MISTAKES.values(), ids=MISTAKES)
def test_mistakes(tmp_path, miniature, capsys, arguments, said):
    config = write_run(tmp_path, miniature)
    g2rpo("train", config, "--train.output", tmp_path / "run", *arguments, code=2)
    err = capsys.readouterr().err
    assert said in err and err.startswith("g2rpo train: error: ")
    assert not (tmp_path / "run").exists()
