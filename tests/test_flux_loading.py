"""Weights as diffusers' from_pretrained loads them, within the memory of the weights themselves."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2rpo.errors import ConfigurationError
from g2rpo.flux import files, loading

CPU = torch.device("cpu")


@pytest.fixture
def folder(miniature: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature, tmp_path / "pipeline"))


def all_weights(folder: Path, name: str = "transformer") -> dict[str, torch.Tensor]:
    return {k: v for file in files.weight_files(folder / name) for k, v in load_file(file).items()}


def load(folder: Path, weights: Path | None = None, dtype: torch.dtype = torch.bfloat16):
    return loading.load_transformer(folder, weights, dtype, CPU)


def assert_same(model: torch.nn.Module, reference: torch.nn.Module) -> None:
    found, expected = model.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
        assert found[key].is_contiguous(), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_as_from_pretrained(miniature, dtype):
    from diffusers import AutoencoderKL, FluxTransformer2DModel

    read = []
    model = loading.load_transformer(miniature, None, dtype, CPU, read.append)
    reference = FluxTransformer2DModel.from_pretrained(
        miniature, subfolder="transformer", torch_dtype=dtype
    )
    assert_same(model, reference)
    assert model.config.guidance_embeds and model.dtype == dtype
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.device == CPU for p in model.parameters())
    assert sum(read) == loading.weights_bytes(files.weight_files(miniature / "transformer")) > 0

    vae = loading.load_vae(miniature, dtype, CPU)
    assert_same(vae, AutoencoderKL.from_pretrained(miniature, subfolder="vae", torch_dtype=dtype))
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("piece", [16, 4096])
def test_one_file_replaces_the_shards(folder, tmp_path, monkeypatch, stored, piece):
    """In pieces that end within a tensor, from every dtype, and with the shards gone."""
    monkeypatch.setattr(loading, "PIECE", piece)
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: torch.randn(value.shape, generator=generator).to(stored)
        for key, value in all_weights(folder).items()
    }
    save_file(weights, tmp_path / "published.safetensors")
    for file in (folder / "transformer").glob("*.safetensors*"):
        file.unlink()
    found = load(folder, tmp_path / "published.safetensors").state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key].to(torch.bfloat16)) for key in weights)


def test_no_parameter_is_the_file(folder, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    save_file(all_weights(folder), file)
    model = load(folder, file)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
        opened.truncate(10)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_that_shrinks_while_it_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PIECE", 64)
    file = tmp_path / "checkpoint.safetensors"
    save_file(all_weights(folder), file)

    def shrink(count: int) -> None:
        with file.open("r+b") as opened:
            opened.truncate(file.stat().st_size // 2)

    with pytest.raises(ConfigurationError, match="checkpoint.safetensors ends before its tensors"):
        loading.load_transformer(folder, file, torch.bfloat16, CPU, shrink)


def test_what_diffusers_keeps_in_float32_and_buffers(miniature, monkeypatch):
    from diffusers import FluxTransformer2DModel

    made = FluxTransformer2DModel.__init__

    @functools.wraps(made)  # diffusers reads its signature
    def with_buffer(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)

    monkeypatch.setattr(FluxTransformer2DModel, "__init__", with_buffer)
    monkeypatch.setattr(FluxTransformer2DModel, "_keep_in_fp32_modules", ["norm_out"])
    model = load(miniature)
    reference = FluxTransformer2DModel.from_pretrained(
        miniature, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    assert_same(model, reference)
    assert {p.dtype for p in model.norm_out.parameters()} == {torch.float32}
    assert model.proj_out.weight.dtype == torch.bfloat16
    assert model.table.dtype == reference.table.dtype and torch.equal(model.table, reference.table)


def rename(weights: dict, old: str, new: str) -> dict:
    return {key.replace(old, new): value for key, value in weights.items()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda w: {"transformer.x.lora_A.weight": torch.zeros(2)},
            ["LoRA adapters", "66 of its 66 keys are missing", ", ..."],
        ),
        (
            lambda w: {"double_blocks.0.img_mod.lin.weight": torch.zeros(2)},
            ["single-file checkpoint", "from_single_file", "are not the model's (double_blocks.0."],
        ),
        (
            lambda w: {k: v for k, v in w.items() if "guidance" not in k},
            ["4 of its 66 keys are missing (time_text_embed.guidance_embedder", "FLUX.1-schnell"],
        ),
        (
            lambda w: w | {"x_embedder.weight": torch.zeros(32, 384)},
            ["x_embedder.weight is [32, 384], expected [32, 64]", "Fill, Depth, Canny"],
        ),
        (
            lambda w: w | {"proj_out.weight": torch.zeros(64, 32, dtype=torch.int8)},
            ["proj_out.weight is I8, expected one of F64", "quantized"],
        ),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, ["Its keys have a prefix", ", ..."]),
        (
            lambda w: rename(w, "single_transformer_blocks.0", "single_transformer_blocks.7"),
            ["missing (single_transformer_blocks.0.", "another FLUX variant"],
        ),
    ],
)
def test_weights_of_something_else(folder, tmp_path, change, expected):
    file = tmp_path / "other.safetensors"
    save_file(change(all_weights(folder)), file)
    with pytest.raises(ConfigurationError) as caught:
        load(folder, file)
    message = str(caught.value)
    assert f"model.transformer is {str(file)!r}" in message
    assert all(part in message for part in expected), message


def test_files_that_are_no_weights(folder, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"PK")
    for path in (folder / "transformer", tmp_path / "weights.bin", tmp_path / "none.safetensors"):
        with pytest.raises(ConfigurationError, match=rf"model\.transformer is '{path}'; expected"):
            load(folder, path)
    with pytest.raises(ConfigurationError, match="perhaps .*00001-of-00004.safetensors"):
        load(folder, folder / "transformer")
    shard = files.weight_files(folder / "transformer")[0]
    with pytest.raises(ConfigurationError, match=r"of its 66 keys are missing"):
        load(folder, shard)
    save_file(load_file(shard), files.weight_files(folder / "transformer")[1])
    with pytest.raises(ConfigurationError, match="not of one download"):
        load(folder)


def test_shards_that_do_not_fit(folder):
    shards = files.weight_files(folder / "transformer")
    first, second = load_file(shards[0]), load_file(shards[1])
    save_file(second | dict([next(iter(first.items()))]), shards[1])
    expected = "transformer does not fit.*1 are there more than once"
    with pytest.raises(ConfigurationError, match=expected):
        load(folder)
    save_file(second, shards[1])
    config = folder / "transformer" / "config.json"
    content = json.loads(config.read_text())
    for change, expected in (
        ({"num_layers": 2}, "of its .* keys are missing .transformer_blocks.1"),
        ({"_class_name": "SD3Transformer2DModel"}, "of a SD3Transformer2DModel; expected a Flux"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantized"),
    ):
        config.write_text(json.dumps(content | change))
        with pytest.raises(ConfigurationError, match=expected):
            load(folder)
    config.unlink()
    with pytest.raises(ConfigurationError, match="config.json is missing"):
        load(folder)


# A process of its own: what it held before, how high it went, and the size of what it loaded.
MEASURE = """
import gc, json, re, sys
from pathlib import Path
import torch
import diffusers
from g2rpo.flux.loading import load_transformer

diffusers.FluxTransformer2DModel  # imported by now

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

for how, folder, weights in json.loads(sys.argv[1]):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = resident("VmRSS")
    if how == "diffusers":
        model = diffusers.FluxTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", torch_dtype=torch.bfloat16
        )
    else:
        weights = weights and Path(weights)
        model = load_transformer(Path(folder), weights, torch.bfloat16, torch.device("cpu"))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps([how, size, (resident("VmHWM") - before) / size]))
    del model
"""


def measure(*loads: tuple[str, str, str | None]) -> list[tuple[str, int, float]]:
    """(how, bytes of the weights, peak of memory while loading over those bytes) of each."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURE, json.dumps(loads)],
        text=True, capture_output=True, timeout=120,
        # what is freed goes back at once, and is not taken for free when it is used again
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def write_large(folder: Path, dtype: torch.dtype) -> Path:
    """A transformer of 340 million bytes in bfloat16, in five shards."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel

    architecture = {
        "num_layers": 4, "num_single_layers": 8, "attention_head_dim": 64,
        "num_attention_heads": 12, "joint_attention_dim": 512, "pooled_projection_dim": 256,
        "guidance_embeds": True, "axes_dims_rope": (16, 24, 24),
    }  # fmt: skip
    place = folder / "transformer"
    with init_empty_weights():
        model = FluxTransformer2DModel(**architecture)
    model.save_config(place)
    keys = list(model.state_dict().items())
    places = {}
    for number in range(5):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00005.safetensors"
        shard = {key: torch.full(value.shape, 0.5, dtype=dtype) for key, value in keys[number::5]}
        save_file(shard, place / name)
        places |= dict.fromkeys(shard, name)
    index = place / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_while_loading():
    """A fifth more than the weights at most: from shards, and from one file of twice their size."""
    with tempfile.TemporaryDirectory() as temporary:  # a gigabyte that pytest would keep
        folder = write_large(Path(temporary), torch.bfloat16)
        single = Path(temporary) / "published.safetensors"
        save_file({key: value.float() for key, value in all_weights(folder).items()}, single)
        found = measure(("g2rpo", str(folder), None), ("g2rpo", str(folder), str(single)))
    print(found)
    assert len(found) == 2
    for _, size, ratio in found:
        assert size > 300e6 and 0.9 < ratio <= 1.2, found
