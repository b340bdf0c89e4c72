"""What `g2rpo sample` refuses, it names: the argument or file, its value, what was expected."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from flux_runs import SIZE, draw, write_full_run, write_lora_run, write_run
from safetensors.torch import load_file, save_file

from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.flux import sample


@pytest.fixture(scope="module")
def run(miniature: Path, tmp_path_factory) -> Path:
    return write_full_run(tmp_path_factory.mktemp("full") / "run", miniature)


@pytest.fixture(scope="module")
def lora_run(miniature: Path, tmp_path_factory) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("lora") / "run", miniature)


def refused(*arguments: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        sample.main([str(argument) for argument in arguments])
    return str(caught.value)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "no prompt is given; expected --prompt"),
        (["--prompt", " "], "--prompt is ' '"),
        (["--prompts", "missing.txt"], "--prompts is 'missing.txt'; expected a file of prompts"),
        (["--prompt", "a", "--height", "100"], "--height is 100; expected a multiple of 16"),
        (["--prompt", "a", "--width", "0"], "--width is 0; expected a multiple of 16"),
        (["--prompt", "a", "--steps", "0"], "--steps is 0; expected at least 1"),
        (["--prompt", "a", "--guidance", "nan"], "--guidance is nan; expected a finite number"),
        (["--prompt", "a", "--max-sequence-length", "513"], "--max-sequence-length is 513"),
        (["--prompt", "a", "--images-per-prompt", "0"], "--images-per-prompt is 0"),
        (["--prompt", "a", "--batch", "0"], "--batch is 0; expected at least 1"),
        (["--prompt", "a", "--seed", "-1"], "--seed is -1; expected 0 to"),
        (["--prompt", "a", "--device", "gpu"], "--device is 'gpu'; expected a device"),
        (["--prompt", "a", "--device", "cpu", "--offload"], "--offload is given, and --device is"),
        (["--prompt", "a", "--checkpoint", "step-000010"], "--checkpoint is given, but MODEL is"),
        (["--prompt", "a", "--ema"], "--ema is given, but MODEL is"),
        (["--prompt", "a", "--lora", "no.safetensors"], "--lora is 'no.safetensors'; expected"),
        (["--prompt", "a", "--transformer", "all.pt"], "--transformer is 'all.pt'; expected"),
        (["--prompt", "a", "--output", __file__], f"--output is {__file__!r}; expected a folder"),
    ],
)
def test_arguments_that_cannot_be(miniature: Path, tmp_path, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(miniature, *arguments)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be(miniature: Path, run: Path, lora_run: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "a")
    said = refused(run, *prompt, "--checkpoint", "step-000030")
    assert said == "--checkpoint is 'step-000030'; expected one of step-000010, step-000020"
    said = refused(run, *prompt, "--checkpoint", "step-000010", "--ema")
    assert "--ema is given" in said and "train.ema" in said
    assert "a run, which is drawn with as" in refused(run, *prompt, "--transformer", "x")
    assert "--lora is 'x', but MODEL is" in refused(lora_run, *prompt, "--lora", "x")
    checkpoint = run / "checkpoints" / "step-000010"
    assert f"{run} --checkpoint step-000010" in refused(checkpoint, *prompt)
    assert "MODEL is 'nowhere', which is no folder here" in refused("nowhere", *prompt)
    assert "a folder without config.yaml" in refused(tmp_path, *prompt)
    said = refused(miniature, *prompt, "--transformer", run / "checkpoints")
    assert "with 0 .safetensors files in it" in said and "perhaps" in said

    def write(folder: Path, update: int) -> None:
        shutil.copytree(checkpoint, folder)

    digits = write_run(tmp_path / "digits", Path("digits"), write)
    assert "a run of the embedded digits model; expected one of FLUX" in refused(digits, *prompt)
    moved = write_run(tmp_path / "moved", Path("gone"), write)
    said = refused(moved, *prompt)
    assert f"model.path (in {moved / 'config.yaml'}) is 'gone'" in said
    shutil.rmtree(moved / "checkpoints")
    assert "a run without a checkpoint" in refused(moved, *prompt)
    for text in ("[", "model: 3", "model: {path: 3}", "train: {}"):
        (moved / "config.yaml").write_text(text)
        assert "config.yaml cannot be read" in refused(moved, *prompt)


@pytest.mark.parametrize(
    "fault, words",
    [
        ("layer", "transformer_blocks.7.attn.to_q.lora_A.weight is of no layer"),
        ("shape", "lora_A.weight is [4, 64], on a layer of [32, 32]"),
        ("none", "of its 0 factors of adapters"),
        ("cut", "bytes; expected"),
    ],
)
def test_a_lora_that_does_not_fit_is_not_left_out(
    miniature: Path, lora_run: Path, tmp_path: Path, fault: str, words: str
) -> None:
    whole = lora_run / "checkpoints/step-000020/lora/pytorch_lora_weights.safetensors"
    broken = tmp_path / "lora.safetensors"
    factors = load_file(whole)
    if fault == "layer":
        factors = {key.replace("blocks.0", "blocks.7"): value for key, value in factors.items()}
    if fault == "shape":
        factors = {key: torch.cat([value, value], dim=1) if "lora_A" in key else value
                   for key, value in factors.items()}  # fmt: skip
    if fault == "none":
        factors = {"transformer.proj_out.bias": torch.zeros(3)}
    save_file(factors, broken)
    if fault == "cut":
        broken.write_bytes(whole.read_bytes()[:-10])
    output = tmp_path / "out"
    said = refused(miniature, "--prompt", "a", *SIZE, "--lora", broken, "--output", output)
    assert str(broken) in said and "expected" in said and words in said
    assert not list(output.glob("*.png"))


def test_a_transformer_that_does_not_fit_is_named(
    miniature: Path, lora_run: Path, tmp_path: Path
) -> None:
    adapters = lora_run / "checkpoints/step-000020/lora/pytorch_lora_weights.safetensors"
    arguments = ("--prompt", "a", "--transformer", adapters, "--output", tmp_path)
    said = refused(miniature, *arguments)
    assert str(adapters) in said and "looks like LoRA adapters" in said


def test_images_are_not_overwritten_unasked(miniature: Path, tmp_path: Path) -> None:
    (first,) = draw(tmp_path, miniature, "--prompt", "a", *SIZE)
    before = first.read_bytes()
    said = refused(miniature, "--prompt", "a", *SIZE, "--output", tmp_path, "--seed", 1)
    assert "1 image would be overwritten (0000-a.png)" in said and "--overwrite" in said
    assert first.read_bytes() == before
    assert len(draw(tmp_path, miniature, "--prompt", "b", *SIZE)) == 2  # beside it, not over it
    draw(tmp_path, miniature, "--prompt", "a", *SIZE, "--seed", 1, "--overwrite")
    assert first.read_bytes() != before


def test_a_black_image_is_an_error_that_names_its_prompt(
    miniature: Path, run: Path, tmp_path: Path
) -> None:
    folder = run / "checkpoints" / "step-000020" / "transformer"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["proj_out.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(TrainingError, match=r"'a fox' \(seed 0\) has NaN or infinite pixels"):
        draw(tmp_path / "out", miniature, "--prompt", "a fox", *SIZE,
             "--transformer", tmp_path / "nan.safetensors")  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "where", ["diffusers.FluxPipeline.__call__", "g2rpo.flux.pipeline.load_vae"]
)
def test_too_little_memory_is_one_sentence_with_the_way_out(
    miniature: Path, tmp_path: Path, monkeypatch, where: str
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(where, full)
    with pytest.raises(TrainingError, match=r"out of memory while .*--offload.*2 GiB\.$"):
        draw(tmp_path, miniature, "--prompt", "a fox", *SIZE)
