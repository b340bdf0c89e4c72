"""A FLUX folder as the trainer's model: against diffusers' pipeline, and with its errors."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2rpo.config import Config
from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.flux import files
from g2rpo.flux import model as room
from g2rpo.flux.embed import embed
from g2rpo.flux.model import CachedEncoders, FluxModel, load_flux
from g2rpo.flux.text import TextEncoders
from g2rpo.policy import Conditions
from g2rpo.rollout import run_ode
from g2rpo.schedule import noise_schedule

PROMPTS = ["a fox in the snow", "an owl", "a street at night", "two cups"]
HEIGHT, WIDTH = 64, 96
TOKENS = 16  # T5's
CPU = torch.device("cpu")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture
def folder(miniature: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(miniature, tmp_path / "pipeline"))


def configure(folder: Path, prompts: Path | None, **keys: object) -> Config:
    """keys: group__key=value."""
    config = Config()
    config.model.path, config.model.device = str(folder), "cpu"
    config.data.prompts = None if prompts is None else str(prompts)
    config.data.max_sequence_length = TOKENS
    config.rollout.height, config.rollout.width = HEIGHT, WIDTH
    config.train.updates = 2
    for key, value in keys.items():
        group, _, name = key.partition("__")
        setattr(getattr(config, group), name, value)
    return config


def load(*arguments: object, **keys: object) -> FluxModel:
    return load_flux(configure(*arguments, **keys), lambda text: None)


def assert_same(found: Conditions, expected: Conditions) -> None:
    assert found.prompt_embeds.dtype == expected.prompt_embeds.dtype
    assert torch.equal(found.prompt_embeds, expected.prompt_embeds)
    assert torch.equal(found.pooled_embeds, expected.pooled_embeds)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEIGHT * WIDTH // 256, 64, generator=generator)


def test_what_is_loaded(miniature, prompts):
    messages = []
    model = load_flux(configure(miniature, prompts), messages.append)
    assert model.latent_shape == (24, 64) and model.prompts == PROMPTS
    assert model.folder == miniature and model.policy.guidance == 3.5
    assert {p.dtype for p in model.policy.transformer.parameters()} == {torch.bfloat16}
    images = model.decode(noise(2))
    assert images.shape == (2, 3, HEIGHT, WIDTH) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    [message] = messages
    told = r": transformer 163 kB and autoencoder \d+ kB in bfloat16 on cpu, loaded in .*as it goes"
    assert re.match(re.escape(str(miniature)) + told, message), message

    square = load(miniature, prompts, rollout__height=None, rollout__width=None)
    assert square.latent_shape == (2025, 64)  # 720 x 720
    assert square.policy.image_ids[-1].tolist() == [0, 44, 44]


def test_dtype_and_other_weights(folder, prompts, tmp_path):
    weights = {}
    for file in files.weight_files(folder / "transformer"):
        weights |= {key: 2 * value.float() for key, value in load_file(file).items()}
        file.unlink()
    save_file(weights, tmp_path / "trained.safetensors")
    model = load(
        folder, prompts, model__transformer=str(tmp_path / "trained.safetensors"),
        model__dtype="float32",
    )  # fmt: skip
    state = model.policy.transformer.state_dict()
    assert all(torch.equal(state[key], value) for key, value in weights.items())
    assert model.policy.dtype == torch.float32


def test_the_velocity_is_the_transformers(miniature, prompts):
    """Called as FluxPipeline calls it: timesteps are sigmas, a guidance a row, ids of one image."""
    from diffusers import FluxPipeline, FluxTransformer2DModel

    model = load(miniature, prompts, rollout__guidance=2.5)
    conditions = model.embed(PROMPTS[:2])
    sigma = torch.tensor([0.75, 0.25])
    transformer = FluxTransformer2DModel.from_pretrained(
        miniature, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    ids = FluxPipeline._prepare_latent_image_ids(
        1, HEIGHT // 16, WIDTH // 16, CPU, conditions.prompt_embeds.dtype
    )
    with torch.no_grad():
        expected = transformer(
            hidden_states=noise(2).bfloat16(), timestep=sigma, guidance=torch.full([2], 2.5),
            pooled_projections=conditions.pooled_embeds,
            encoder_hidden_states=conditions.prompt_embeds,
            txt_ids=torch.zeros(TOKENS, 3), img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
    assert torch.equal(model.policy.velocity(noise(2), sigma, conditions), expected)
    other = load(miniature, prompts, rollout__guidance=3.5)
    assert not torch.equal(other.policy.predict(noise(2), sigma, conditions), expected)


@pytest.mark.parametrize("steps", [1, 6])
def test_a_sampling_is_the_pipelines(folder, prompts, steps):
    from diffusers import FluxPipeline

    place = folder / "scheduler" / "scheduler_config.json"
    scheduler = json.loads(place.read_text()) | {"use_dynamic_shifting": False, "shift": 3.0}
    place.write_text(json.dumps(scheduler))
    model = load(folder, prompts, model__dtype="float32")
    conditions = model.embed(PROMPTS[1:3])
    sigmas = noise_schedule(steps, 3.0).float()
    *_, (_, _, _, latents) = run_ode(model.policy, noise(2), conditions, sigmas)

    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        prompt_embeds=conditions.prompt_embeds.float(),
        pooled_prompt_embeds=conditions.pooled_embeds.float(),
        sigmas=torch.linspace(1, 1 / steps, steps).tolist(), num_inference_steps=steps,
        latents=noise(2), height=HEIGHT, width=WIDTH, guidance_scale=3.5, output_type="pt",
        max_sequence_length=TOKENS,
    ).images  # fmt: skip
    images = model.decode(latents)
    assert torch.allclose(images, expected, atol=2e-5)
    assert not torch.allclose(images, model.decode(noise(2)), atol=0.05)  # it did go somewhere


def test_embeddings_have_the_same_bits_from_everywhere(miniature, prompts, tmp_path, monkeypatch):
    expected = TextEncoders(miniature, CPU, max_sequence_length=TOKENS).encode(PROMPTS)
    going = load(miniature, prompts)
    assert_same(going.embed(PROMPTS), expected)
    rows = [2, 0, 0, 3]
    assert_same(going.embed([PROMPTS[i] for i in rows]), expected[torch.tensor(rows)])

    config = configure(miniature, prompts, data__embeddings=str(tmp_path / "embeddings"))
    assert embed(config) == 0
    # The encoders are neither needed nor loaded then.
    monkeypatch.setattr(room, "TextEncoders", None)
    stored = load_flux(config, lambda text: None)
    assert_same(stored.embed(PROMPTS), expected)
    assert_same(stored.embed([PROMPTS[i] for i in rows]), expected[torch.tensor(rows)])


def test_the_cache_encodes_once_and_forgets_the_oldest(miniature):
    encoders = TextEncoders(miniature, CPU, max_sequence_length=TOKENS)
    expected = encoders.encode(PROMPTS)
    encoded, loads = [], []

    class Counting:
        max_sequence_length = encoders.max_sequence_length

        def encode(self, prompts):
            encoded.append(list(prompts))
            return encoders.encode(prompts)

        def too_long(self, prompts):
            return [prompt for prompt in prompts if prompt in cut]

    def load_encoders():
        loads.append(1)
        return Counting()

    messages: list[str] = []
    cut = PROMPTS[1:3]
    cache = CachedEncoders(
        load_encoders, CPU, limit=2 * encoders.prompt_bytes, on_message=messages.append
    )
    assert not loads
    assert_same(cache(PROMPTS[:2]), expected[:2])
    assert_same(cache([PROMPTS[1], PROMPTS[0], PROMPTS[1]]), expected[torch.tensor([1, 0, 1])])
    assert encoded == [PROMPTS[:2]]
    assert_same(cache(PROMPTS[2:3]), expected[2:3])  # in place of the second, used before the first
    assert_same(cache(PROMPTS[:3]), expected[:3])  # more than it keeps are given all the same
    assert encoded == [PROMPTS[:2], PROMPTS[2:3], PROMPTS[1:2]]
    assert sum(room._bytes(row) for row in cache._rows.values()) == 2 * encoders.prompt_bytes
    assert len(loads) == 1
    assert len(messages) == 1 and f"are cut, the first: {PROMPTS[1]!r}" in messages[0]
    nothing_kept = CachedEncoders(load_encoders, CPU, limit=0)
    assert_same(nothing_kept(PROMPTS[:2]), expected[:2])
    assert not nothing_kept._rows
    # A kept row is its own: changing what was handed out does not change it.
    cache(PROMPTS[:1]).prompt_embeds.zero_()
    assert_same(cache(PROMPTS[:1]), expected[:1])


def test_encoders_that_do_not_fit(miniature, prompts, monkeypatch):
    def full(self, prompts):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(TextEncoders, "encode", full)
    with pytest.raises(TrainingError, match="g2rpo embed.*no room"):
        load(miniature, prompts).embed(PROMPTS)


def test_a_resumed_run_decodes_as_before(miniature, prompts):
    model = load(miniature, prompts)
    assert model.state_dict() == {"batch": 4, "tiled": False}
    model.load_state_dict({"batch": 2, "tiled": True})
    assert model.state_dict() == {"batch": 2, "tiled": True}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"data__prompts": None}, r"data\.prompts is null"),
        ({"rollout__height": 100}, r"rollout\.height is 100; expected a multiple of 16"),
        ({"rollout__width": 721}, r"rollout\.width is 721"),
        ({"model__device": "warp"}, r"model\.device is 'warp'"),
        ({"model__path": "digit"}, r"model\.path is 'digit'"),
        ({"model__transformer": "nowhere.safetensors"}, r"model\.transformer is .nowhere"),
        ({"data__embeddings": "nowhere"}, r"data\.embeddings is 'nowhere'"),
    ],
)
def test_wrong_keys(miniature, prompts, keys, expected):
    with pytest.raises(ConfigurationError, match=expected):
        load(miniature, prompts, **keys)


def test_embeddings_that_do_not_serve_this_run(folder, prompts, tmp_path):
    place = str(tmp_path / "embeddings")
    few = tmp_path / "few.txt"
    few.write_text("\n".join(PROMPTS[:2]))
    embed(configure(folder, few, data__embeddings=place))
    expected = "lacks 2 prompts that this run will use, the first 'a street at night'; run `g2rpo"
    with pytest.raises(ConfigurationError, match=expected):
        load(folder, prompts, data__embeddings=place)
    load(folder, few, data__embeddings=place)
    with pytest.raises(ConfigurationError, match=r"max_sequence_length is 17"):
        load(folder, few, data__embeddings=place, data__max_sequence_length=17)
    # Weights of the encoders may be gone by then.
    for name in ("text_encoder", "text_encoder_2"):
        (folder / name / "model.safetensors").unlink()
    load(folder, few, data__embeddings=place)
    with pytest.raises(ConfigurationError, match="text_encoder has no weights"):
        load(folder, few)


def test_components_of_different_pipelines(folder, prompts):
    from diffusers import FluxTransformer2DModel

    from g2rpo.flux.miniature import TRANSFORMER

    for key, value in (("in_channels", 128), ("joint_attention_dim", 48)):
        shutil.rmtree(folder / "transformer")
        FluxTransformer2DModel(**TRANSFORMER | {key: value}).save_pretrained(folder / "transformer")
        with pytest.raises(ConfigurationError, match=f"has {key} {value}; expected"):
            load(folder, prompts)


def test_a_device_that_is_too_small(miniature, prompts, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(room, "load_transformer", full)
    with pytest.raises(ConfigurationError, match=r"model\.device is 'cpu'.*does not fit.*no room"):
        load(miniature, prompts)
