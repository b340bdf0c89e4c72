"""open_clip's checkpoints in transformers' CLIPModel: the features of the published definition."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from open_clip_small import image_features, make_state, text_features, tokens
from safetensors.torch import save_file
from torch import Tensor

from g2rpo.errors import ConfigurationError
from g2rpo.rewards.open_clip_weights import architecture, choose_activation, load_open_clip
from g2rpo.rewards.tensors import read_tensors

PROMPTS = ("a cat", "", "two lighthouses in a storm", "猫 и кот")
# vision width, text width, and the widths of their heads: 80 and 64 as in ViT-H-14, and 64 alone.
HEADS = {"heads of 80 and 64": (160, 128, 80, 64), "heads of 64": (128, 192, 64, 64)}


def features(file: Path, pixels: Tensor, ids: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Of the loaded model, by transformers' own forward."""
    model = load_open_clip(file, **options)
    out = model(input_ids=ids, pixel_values=pixels)
    return out.image_embeds, out.text_embeds


@pytest.fixture(params=HEADS)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int, int]:
    return HEADS[request.param]


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_features_are_open_clips(tmp_path: Path, shape: tuple[int, ...], quick: bool) -> None:
    vision, text, vision_head, text_head = shape
    state = make_state(vision, text)
    torch.save(state, tmp_path / "clip.pt")
    pixels, ids = torch.randn(3, 3, 32, 32), torch.tensor([tokens(p) for p in PROMPTS])
    images, texts = features(
        tmp_path / "clip.pt", pixels, ids, activation="quick_gelu" if quick else "gelu",
        vision_head_width=vision_head, text_head_width=text_head,
    )  # fmt: skip
    expected = image_features(state, pixels, vision_head, quick)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    expected_texts = text_features(state, ids, text_head, quick)
    torch.testing.assert_close(texts, expected_texts, rtol=0, atol=1e-5)
    # and the test would see it if the activation or the heads were the others
    assert (image_features(state, pixels, vision_head, not quick) - expected).abs().max() > 1e-3
    other = image_features(state, pixels, vision_head // 2, quick)
    assert (other - expected).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["plain", "nested", "module", "custom text", "safetensors", "old"])
def test_every_form_of_file(tmp_path: Path, form: str) -> None:
    state = make_state(128, 128)
    file = tmp_path / ("clip.safetensors" if form == "safetensors" else "clip.bin")
    if form == "safetensors":
        save_file(state, file)
    elif form == "nested":
        torch.save({"epoch": 3, "state_dict": state, "name": "x"}, file)
    elif form == "module":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    elif form == "custom text":
        texts = ("positional_embedding", "text_projection", "token_", "transformer.", "ln_final")
        torch.save({f"text.{k}" if k.startswith(texts) else k: v for k, v in state.items()}, file)
    elif form == "old":
        torch.save(state, file, _use_new_zipfile_serialization=False)
    else:
        torch.save({**state, "context_length": torch.tensor(77)}, file)  # OpenAI's, no weight
    pixels, ids = torch.randn(2, 3, 32, 32), torch.tensor([tokens("a dog")])
    images, texts = features(file, pixels, ids)
    expected = image_features(state, pixels, 64, False), text_features(state, ids, 64, False)
    torch.testing.assert_close((images, texts), expected, rtol=0, atol=1e-5)


def test_weights_are_copies(tmp_path: Path) -> None:
    """The file may be replaced while the model is in use."""
    state = make_state(128, 128)
    torch.save(state, tmp_path / "clip.pt")
    model = load_open_clip(tmp_path / "clip.pt")
    with (tmp_path / "clip.pt").open("r+b") as file:
        file.write(bytes((tmp_path / "clip.pt").stat().st_size))
    weight = model.vision_model.embeddings.patch_embedding.weight
    assert torch.equal(weight, state["visual.conv1.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_half_precision_file_and_bfloat16(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in make_state(128, 128).items()}
    torch.save(state, tmp_path / "clip.pt")
    model = load_open_clip(tmp_path / "clip.pt", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    pixels = torch.randn(2, 3, 32, 32)
    pooled = model.vision_model(pixel_values=pixels.bfloat16()).pooler_output
    found = torch.nn.functional.normalize(model.visual_projection(pooled).float(), dim=-1)
    expected = image_features({k: v.float() for k, v in state.items()}, pixels, 64, False)
    assert (found * expected).sum(1).min() > 0.999


def test_architecture_of_vit_h_14() -> None:
    """The one of HPS and DFN5B, from its shapes alone; no memory is taken."""
    with torch.device("meta"):
        state = vit_h_14(224)
    found = architecture(state, "ViT-H-14")
    assert (found.vision.width, found.vision.layers, found.vision.heads) == (1280, 32, 16)
    assert (found.text.width, found.text.layers, found.text.heads) == (1024, 24, 16)
    assert (found.vision.mlp, found.text.mlp, found.patch) == (5120, 4096, 14)
    assert (found.resolution, found.context, found.vocabulary) == (224, 77, 49408)
    assert found.embedding == 1024
    with torch.device("meta"):
        assert architecture(vit_h_14(378), "ViT-H-14").resolution == 378


def vit_h_14(resolution: int) -> dict[str, Tensor]:
    """Keys as of a small one, shapes of open_clip's model_configs/ViT-H-14.json."""
    places = (resolution // 14) ** 2 + 1
    state = {
        "positional_embedding": torch.empty(77, 1024),
        "text_projection": torch.empty(1024, 1024), "logit_scale": torch.empty(()),
        "visual.class_embedding": torch.empty(1280),
        "visual.positional_embedding": torch.empty(places, 1280),
        "visual.proj": torch.empty(1280, 1024), "visual.conv1.weight": torch.empty(1280, 3, 14, 14),
        "token_embedding.weight": torch.empty(49408, 1024),
    }  # fmt: skip
    outer = (("visual.ln_pre", 1280), ("visual.ln_post", 1280), ("ln_final", 1024))
    for name, width in outer:
        state[f"{name}.weight"] = state[f"{name}.bias"] = torch.empty(width)
    for tower, width, layers in (("visual.transformer", 1280, 32), ("transformer", 1024, 24)):
        for i in range(layers):
            place = f"{tower}.resblocks.{i}"
            sizes = {"ln_1": (width,), "ln_2": (width,), "attn.out_proj": (width, width),
                     "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}  # fmt: skip
            for name, size in sizes.items():
                state[f"{place}.{name}.weight"] = torch.empty(size)
                state[f"{place}.{name}.bias"] = torch.empty(size[0])
            state[f"{place}.attn.in_proj_weight"] = torch.empty(3 * width, width)
            state[f"{place}.attn.in_proj_bias"] = torch.empty(3 * width)
    return state


@pytest.mark.parametrize(
    ("file", "activation", "why"),
    [
        ("DFN5B-CLIP-ViT-H-14-378/open_clip_pytorch_model.bin", "quick_gelu", "dfn"),
        ("x/openai-ViT-L-14.pt", "quick_gelu", "openai"),
        ("x/vit_b_32-quickgelu-laion400m_e31.pt", "quick_gelu", "quickgelu"),
        ("x/HPS_v2.1_compressed.pt", "gelu", "no name"),
    ],
)
def test_activation_by_name(file: str, activation: str, why: str) -> None:
    found, reason = choose_activation(Path(file))
    assert found == activation and why in reason
    assert choose_activation(Path(file), "gelu") == ("gelu", "given")


def test_unknown_activation() -> None:
    with pytest.raises(ConfigurationError, match="activation is 'relu'; expected 'gelu'"):
        choose_activation(Path("x"), "relu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("visual.proj"), "lacks 1 of that one's tensors, 'visual.proj'"),
        (lambda s: s.pop("transformer.resblocks.0.mlp.c_fc.bias"), r"resblocks.0.mlp.c_fc.bias"),
        (lambda s: s.update({"visual.transformer.resblocks.1.ls_1.gamma": torch.ones(128)}),
         "holds 1 tensors that open_clip's CLIP has not, 'visual.transformer.resblocks.1.ls_1"),
        (lambda s: s.update({"visual.proj": torch.ones(128, 40)}), "text_projection.weight.*shape"),
        (lambda s: s.update({"ln_final.bias": torch.ones(3)}), r"has shape \(3,\); expected \(128"),
    ],
)  # fmt: skip
def test_what_is_not_clip(tmp_path: Path, change, words: str) -> None:
    state = make_state(128, 128)
    change(state)
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ConfigurationError, match=f"clip.pt.*{words}"):
        load_open_clip(tmp_path / "clip.pt")


def test_another_model(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ConfigurationError, match="other.pt is no CLIP of open_clip .*it lacks 38"):
        load_open_clip(tmp_path / "other.pt")


def test_heads_that_do_not_divide(tmp_path: Path) -> None:
    torch.save(make_state(160, 128), tmp_path / "clip.pt")
    with pytest.raises(ConfigurationError, match="160 wide, no multiple of a head's 64"):
        load_open_clip(tmp_path / "clip.pt")


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "was here"
    torch.save(
        {"state_dict": make_state(128, 128), "x": Touch(target)}, tmp_path / "clip.pt",
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="clip.pt is a pickle that needs .* it is refused"):
        load_open_clip(tmp_path / "clip.pt")
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\3\4 no archive"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clip.pt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="clip.pt cannot be read .*: get it anew"):
        read_tensors(tmp_path / "clip.pt", "get it anew")


def test_cut_short(tmp_path: Path) -> None:
    torch.save(make_state(128, 128), tmp_path / "clip.pt")
    whole = (tmp_path / "clip.pt").read_bytes()
    (tmp_path / "clip.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigurationError, match="clip.pt cannot be read"):
        read_tensors(tmp_path / "clip.pt")


def test_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "clip.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConfigurationError, match="pointer of git-lfs"):
        read_tensors(tmp_path / "clip.pt")


def test_without_tensors(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "epoch": 1}, tmp_path / "a.pt")
    torch.save([1, 2], tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ConfigurationError, match=f"{name} holds a .* without tensors"):
            read_tensors(tmp_path / name)


@pytest.mark.filterwarnings("ignore")  # torch deprecates what its users still have
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "jit.pt")
    assert zipfile.is_zipfile(tmp_path / "jit.pt")
    with pytest.raises(ConfigurationError, match="jit.pt is a TorchScript program"):
        read_tensors(tmp_path / "jit.pt")
