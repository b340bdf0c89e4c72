"""`g2rpo sample` draws what diffusers alone draws from the same checkpoint.

Pixels are compared exactly: with the printed lines executed as they are, and with both forms of the
G2RPO authors' inference script on a checkpoint of this trainer.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flux_runs import (
    ALPHA,
    RANK,
    SIZE,
    TARGETS,
    draw,
    pixels,
    write_full_run,
    write_lora_run,
    write_run,
)
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from g2rpo.flux import sample

# The name that every diffusers since 0.35 knows, in the lines printed and in the authors' script.
pytestmark = pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")


@pytest.fixture(scope="module")
def run(miniature: Path, tmp_path_factory) -> Path:
    return write_full_run(tmp_path_factory.mktemp("full") / "run", miniature)


@pytest.fixture(scope="module")
def lora_run(miniature: Path, tmp_path_factory) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("lora") / "run", miniature)


def test_a_run_is_drawn_with_its_newest_checkpoint(run: Path, tmp_path: Path, capsys) -> None:
    prompts = ("A red fox, in the snow & wind at night!", "???", "Ein Füchslein")
    shutil.copytree(run, tmp_path / "run")
    sample.main([str(tmp_path / "run"), "--prompt", *prompts, *SIZE, "--seed", "7"])
    output = tmp_path / "run" / "samples-step-000020"
    files = sorted(output.iterdir())
    assert [file.name for file in files] == [
        "0000-a-red-fox-in-the-snow.png", "0001.png", "0002-ein-füchslein.png",
    ]  # fmt: skip
    assert f"3 images in {output}" in capsys.readouterr().out
    with Image.open(files[2]) as picture:
        assert picture.size == (48, 32)
        said = dict(picture.text)
    assert said.pop("weights").endswith(
        "step-000020/transformer/diffusion_pytorch_model.safetensors"
    )
    assert Path(said.pop("model")).is_dir()
    assert said == {
        "prompt": "Ein Füchslein", "seed": "9", "steps": "2", "guidance": "3.5", "size": "48x32",
        "max_sequence_length": "512", "dtype": "bfloat16",
    }  # fmt: skip
    older = draw(tmp_path / "old", run, "--prompt", *prompts, *SIZE, "--seed", "7",
                 "--checkpoint", "step-000010")  # fmt: skip
    assert (pixels(older[0]) != pixels(files[0])).any()


SOURCES = {
    "flux": lambda run, lora: [],
    "full": lambda run, lora: [run, "--checkpoint", "step-000010"],
    "full, average": lambda run, lora: [run, "--ema", "--dtype", "float32"],
    "average in bfloat16": lambda run, lora: [run, "--ema"],
    "lora": lambda run, lora: [lora],
    "lora, average": lambda run, lora: [lora, "--ema"],
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_printed_lines_draw_the_same_image(
    name: str, miniature: Path, run: Path, lora_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    arguments = SOURCES[name](run, lora_run) or [miniature]
    (drawn,) = draw(tmp_path / "out", *arguments, "--prompt", 'a "fox"', *SIZE, "--seed", 3)
    lines = capsys.readouterr().out.partition("\n\n")[2]
    assert '.to("cpu")' in lines or torch.cuda.is_available()
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert (pixels(tmp_path / "image.png") == pixels(drawn)).all()
    if name != "flux":
        (plain,) = draw(tmp_path / "plain", miniature, "--prompt", 'a "fox"', *SIZE, "--seed", 3)
        assert (pixels(plain) != pixels(drawn)).any()


def test_files_on_a_flux_folder_draw_as_the_run_they_are_of(
    miniature: Path, run: Path, lora_run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    what = ("--prompt", "a fox", *SIZE)
    (full,) = draw(tmp_path / "1", run, *what)
    weights = run / "checkpoints/step-000020/transformer"
    (folder,) = draw(tmp_path / "2", miniature, *what, "--transformer", weights)
    assert (pixels(full) == pixels(folder)).all()
    renamed = tmp_path / "my-adapters.safetensors"
    shutil.copy(lora_run / "checkpoints/step-000020/lora/pytorch_lora_weights.safetensors", renamed)
    (lora,) = draw(tmp_path / "3", lora_run, *what)
    (file,) = draw(tmp_path / "4", miniature, *what, "--lora", renamed)
    assert (pixels(lora) == pixels(file)).all()
    capsys.readouterr()
    file = weights / "diffusion_pytorch_model.safetensors"
    (both,) = draw(tmp_path / "5", miniature, *what, "--lora", renamed, "--transformer", file)
    monkeypatch.chdir(tmp_path)
    exec(capsys.readouterr().out.partition("\n\n")[2], {})
    assert (pixels(tmp_path / "image.png") == pixels(both)).all()
    assert (pixels(both) != pixels(full)).any() and (pixels(both) != pixels(lora)).any()


def test_a_lora_on_other_weights_than_the_folders_is_drawn_on_those(
    miniature: Path, run: Path, lora_run: Path, tmp_path: Path
) -> None:
    """model.transformer of the run is what its adapters were trained on."""
    weights = run / "checkpoints/step-000010/transformer/diffusion_pytorch_model.safetensors"
    lora = lora_run / "checkpoints/step-000020/lora"
    trained_on = write_run(
        tmp_path / "run",
        miniature,
        lambda checkpoint, update: shutil.copytree(lora, checkpoint / "lora"),
        transformer=str(weights),
    )
    (drawn,) = draw(tmp_path / "1", trained_on, "--prompt", "a fox", *SIZE)
    (given,) = draw(tmp_path / "2", miniature, "--prompt", "a fox", *SIZE, "--lora", lora,
                    "--transformer", weights)  # fmt: skip
    assert (pixels(drawn) == pixels(given)).all()


def test_the_authors_inference_script_takes_our_checkpoint_in_both_its_forms(
    miniature: Path, run: Path, tmp_path: Path
) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    checkpoint = run / "checkpoints" / "step-000020" / "transformer"
    (ours,) = draw(tmp_path, run, "--prompt", "a fox", "--height", "32", "--width", "32",
                   "--steps", "50")  # fmt: skip

    def theirs(pipe: FluxPipeline) -> np.ndarray:
        images = pipe(
            "a fox", height=32, width=32, guidance_scale=3.5, num_inference_steps=50,
            max_sequence_length=512, generator=torch.Generator("cpu").manual_seed(0),
        ).images  # fmt: skip
        return np.asarray(images[0]).astype(int)

    transformer = FluxTransformer2DModel.from_pretrained(
        checkpoint, use_safetensors=True, torch_dtype=torch.bfloat16
    )
    pipe = FluxPipeline.from_pretrained(miniature, transformer=None, torch_dtype=torch.bfloat16)
    pipe.transformer = transformer
    assert (theirs(pipe) == pixels(ours)).all()

    pipe = FluxPipeline.from_pretrained(miniature, torch_dtype=torch.bfloat16)
    state = load_file(checkpoint / "diffusion_pytorch_model.safetensors")
    pipe.transformer.load_state_dict(state, strict=True)
    assert (theirs(pipe) == pixels(ours)).all()


def test_a_loras_alpha_is_not_taken_for_its_rank(miniature: Path, lora_run: Path) -> None:
    """The adapters are worth alpha / rank * B A, by their factors as the file has them."""
    from diffusers import FluxPipeline

    folder = lora_run / "checkpoints" / "step-000020" / "lora"
    pipe = FluxPipeline.from_pretrained(miniature)
    pipe.load_lora_weights(folder)
    factors = load_file(folder / "pytorch_lora_weights.safetensors")
    names = {key.partition(".lora_")[0].removeprefix("transformer.") for key in factors}
    assert names == {f"transformer_blocks.0.{target}" for target in TARGETS} | {
        "single_transformer_blocks.0.attn.to_q"
    }
    for name in names:
        layer = pipe.transformer.get_submodule(name)
        a, b = (factors[f"transformer.{name}.lora_{f}.weight"] for f in "AB")
        torch.testing.assert_close(layer.get_delta_weight("default_0"), ALPHA / RANK * b @ a)


def test_the_folders_transformer_is_not_read_beside_a_checkpoints(
    miniature: Path, run: Path, tmp_path: Path
) -> None:
    without = tmp_path / "flux"
    shutil.copytree(miniature, without, ignore=shutil.ignore_patterns("diffusion_pytorch_model-*"))
    assert not list((without / "transformer").glob("*.safetensors"))
    weights = run / "checkpoints" / "step-000020" / "transformer"
    (one,) = draw(tmp_path / "1", without, "--transformer", weights, "--prompt", "a fox", *SIZE)
    (two,) = draw(tmp_path / "2", run, "--prompt", "a fox", *SIZE)
    assert (pixels(one) == pixels(two)).all()


def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(
    miniature: Path, tmp_path: Path
) -> None:
    text = tmp_path / "prompts.jsonl"
    text.write_text('{"text": "a fox"}\n{"text": "a crow"}\n')
    more = ("--images-per-prompt", 2, "--dtype", "float32", *SIZE)
    together = draw(tmp_path / "1", miniature, "--prompts", text, "--column", "text", *more,
                    "--batch", 3, "--seed", 5)  # fmt: skip
    assert [re.sub(r"^\d+-|\.png$", "", file.name) for file in together] == [
        "a-fox", "a-fox", "a-crow", "a-crow",
    ]  # fmt: skip
    (alone,) = draw(tmp_path / "2", miniature, "--prompt", "a crow", *SIZE, "--dtype", "float32",
                    "--seed", 8)  # fmt: skip
    # of a batch, arithmetic rounds otherwise: at most one level of 255 comes of it in float32
    assert abs(pixels(together[3]) - pixels(alone)).max() <= 1
    for other in together[:3]:
        assert abs(pixels(other) - pixels(alone)).max() > 20


def test_a_terminal_shows_the_image_in_progress(miniature: Path, tmp_path, monkeypatch) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, force_interactive=True, width=100)
    monkeypatch.setattr(sample, "Console", lambda: terminal)
    draw(tmp_path, miniature, "--prompt", "a fox", "a crow", *SIZE)
    assert "image 2/2" in out.getvalue() and str(tmp_path) not in out.getvalue()


def test_the_command_says_its_own_lines_and_nothing_else(miniature: Path, tmp_path: Path) -> None:
    """In a process of its own, for what the libraries say when they are imported."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n" + "a long story of a fox " * 30 + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "g2rpo.cli", "sample", miniature, "--prompts", prompts, *SIZE,
         "--max-sequence-length", "64", "--output", tmp_path / "out", "--device", "cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Reading the transformer, 163 kB")
    assert lines[1].startswith("1 prompt longer than --max-sequence-length 64 will be cut")
    assert lines[2].startswith("1/2  ") and lines[2].endswith("out/0000-a-fox.png")
    assert lines[3].startswith("2/2  ") and lines[3].endswith("0001-a-long-story-of-a-fox.png")
    assert lines[4] == f"2 images in {tmp_path / 'out'}"
    assert lines[7] == "import torch"
