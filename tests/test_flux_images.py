"""FLUX's latents and images against diffusers' own packing, ids and pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.flux import images

HEIGHT, WIDTH = 64, 96
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(miniature: Path):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(miniature, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def vae(miniature: Path):
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(miniature, subfolder="vae", torch_dtype=torch.float32)


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEIGHT * WIDTH // 256, 64, generator=generator)


def starve(monkeypatch, vae, fits) -> list[tuple[int, ...]]:
    """Let `vae.decoder` run out of memory unless fits(n, h, w). Returns what it will be asked."""
    asked = []
    whole = vae.decoder.forward

    def forward(latents, *args, **kwargs):
        shape = latents.shape[0], *latents.shape[2:]
        asked.append(shape)
        if not fits(*shape):
            raise torch.OutOfMemoryError(f"no room for {shape}")
        return whole(latents, *args, **kwargs)

    monkeypatch.setattr(vae.decoder, "forward", forward)
    return asked


def test_packing_and_ids_are_diffusers(pipeline):
    latents = torch.randn(3, 16, 8, 12)
    packed = images.pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 3, 16, 8, 12))
    assert torch.equal(
        images.unpack(packed, 8, 12), pipeline._unpack_latents(packed, HEIGHT, WIDTH, 8)
    )
    assert torch.equal(images.unpack(packed, 8, 12), latents)
    ids = pipeline._prepare_latent_image_ids(3, 4, 6, CPU, torch.float32)
    assert torch.equal(images.position_ids(8, 12), ids)
    assert images.position_ids(8, 12).dtype == torch.float32


def test_latent_shape(vae):
    assert images.latent_shape(720, 720, vae.config) == (2025, 64)
    assert images.latent_shape(HEIGHT, WIDTH, vae.config) == (24, 64)
    for height, width, key in ((720, 721, "width"), (8, 64, "height"), (0, 64, "height")):
        with pytest.raises(ConfigurationError, match=rf"rollout\.{key} .*multiple of 16"):
            images.latent_shape(height, width, vae.config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_as_by_the_pipeline(miniature, dtype):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(miniature, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    call = {
        "prompt": ["a fox", "an owl"], "height": HEIGHT, "width": WIDTH, "num_inference_steps": 2,
        "max_sequence_length": 16,
    }  # fmt: skip
    drawn = {}
    for kind in ("latent", "pt"):
        generator = torch.Generator().manual_seed(3)
        drawn[kind] = pipe(**call, output_type=kind, generator=generator).images
    decoder = images.ImageDecoder(pipe.vae, HEIGHT, WIDTH, CPU)
    decoded = decoder.decode(drawn["latent"])
    assert decoded.shape == (2, 3, HEIGHT, WIDTH) and decoded.dtype == torch.float32
    assert torch.equal(decoded, drawn["pt"].float())
    assert 0 <= decoded.min() < decoded.max() <= 1 and not decoded.requires_grad


def test_scale_and_shift_are_the_vaes_own(vae):
    decoder = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU)
    before = decoder.decode(tokens(1))
    vae.register_to_config(scaling_factor=0.8, shift_factor=-0.3)
    latents = (tokens(1) / 0.4 + 0.2 + 0.3) * 0.8  # which those bring to the same place
    assert torch.allclose(decoder.decode(latents), before, atol=1e-5)


def test_batches_are_of_four_whatever_is_asked(vae, monkeypatch):
    asked = starve(monkeypatch, vae, lambda n, h, w: True)
    decoder = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU)
    decoded = decoder.decode(tokens(10))
    assert [n for n, *_ in asked] == [4, 4, 2]
    assert torch.equal(decoded[4:8], decoder.decode(tokens(10)[4:8]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tiled", [False, True])
def test_what_is_not_finite_is_nan_and_alone(vae, value, tiled):
    latents = tokens(3)
    latents[1, 5, 7] = value
    decoder = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU)
    decoder.load_state_dict({"batch": 4, "tiled": tiled})
    decoded = decoder.decode(latents)
    assert decoded[1].isnan().all()
    assert decoded[[0, 2]].isfinite().all()


def test_out_of_memory_halves_the_batch_once(vae, monkeypatch):
    messages = []
    whole = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU).decode(tokens(6))
    asked = starve(monkeypatch, vae, lambda n, h, w: n <= 1)
    decoder = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU, messages.append)
    assert torch.allclose(decoder.decode(tokens(6)), whole, atol=1e-5)
    assert [n for n, *_ in asked] == [4, 2, 1, 1, 1, 1, 1, 1]
    assert len(messages) == 2
    assert "from now on 2 at once" in messages[0] and "from now on 1 at once" in messages[1]
    asked.clear()
    decoder.decode(tokens(2))
    assert [n for n, *_ in asked] == [1, 1] and len(messages) == 2
    assert decoder.state_dict() == {"batch": 1, "tiled": False}


def test_fewer_images_than_a_batch_are_halved_as_they_are(vae, monkeypatch):
    asked = starve(monkeypatch, vae, lambda n, h, w: n <= 1)
    images.ImageDecoder(vae, HEIGHT, WIDTH, CPU, lambda text: None).decode(tokens(3))
    assert [n for n, *_ in asked] == [3, 1, 1, 1]


def test_one_image_too_large_is_decoded_in_tiles_and_so_is_the_resumed_run(vae, monkeypatch):
    messages = []
    asked = starve(monkeypatch, vae, lambda n, h, w: n * h * w <= 64)
    decoder = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU, messages.append)
    decoded = decoder.decode(tokens(2))
    assert decoded.shape == (2, 3, HEIGHT, WIDTH) and decoded.isfinite().all()
    assert "tiles of 64 pixels" in messages[-1] and len(messages) == 2
    state = decoder.state_dict()
    assert state == {"batch": 1, "tiled": True}

    vae.disable_tiling()
    asked.clear()
    resumed = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU, messages.append)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.decode(tokens(2)), decoded)
    assert {n for n, *_ in asked} == {1} and len(messages) == 2
    with pytest.raises(ValueError, match="batch"):
        resumed.load_state_dict({"batch": 0, "tiled": False})


@pytest.mark.parametrize("size", [(720, 720), (1024, 1024), (720, 1280), (48, 32)])
def test_tiles_of_real_sizes_are_smaller_than_the_image(vae, size):
    """diffusers' own tile of 1024 pixels would not divide any of them."""
    vae.register_to_config(sample_size=1024)
    decoder = images.ImageDecoder(vae, *size, CPU)
    decoder.load_state_dict({"batch": 1, "tiled": True})
    assert vae.use_tiling and decoder.tile < max(size)
    assert vae.tile_latent_min_size * 8 == decoder.tile
    if max(size) < 100:
        latents = torch.randn(1, *images.latent_shape(*size, vae.config))
        assert decoder.decode(latents).shape == (1, 3, *size)


def test_no_memory_for_a_single_tile(vae, monkeypatch):
    starve(monkeypatch, vae, lambda n, h, w: False)
    decoder = images.ImageDecoder(vae, HEIGHT, WIDTH, CPU, lambda text: None)
    with pytest.raises(TrainingError, match=r"rollout\.height.*64 x 96 pixels.*in tiles.*no room"):
        decoder.decode(tokens(2))
    small = images.ImageDecoder(vae, 16, 32, CPU, lambda text: None)  # too small for tiles
    with pytest.raises(TrainingError, match="16 x 32"):
        small.decode(torch.randn(1, 2, 64))


def test_latents_of_another_size(vae):
    with pytest.raises(ValueError, match=r"\[1, 23, 64\]; expected \[N, 24, 64\]"):
        images.ImageDecoder(vae, HEIGHT, WIDTH, CPU).decode(tokens(1)[:, :23])
