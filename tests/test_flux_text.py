"""The text encoders: the bits of diffusers' own pipeline, and what damaged folders are told."""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from g2rpo.errors import ConfigurationError
from g2rpo.flux.miniature import write_miniature
from g2rpo.flux.text import TextEncoders, embedding_widths, fingerprint, present

CPU = torch.device("cpu")
LENGTH = 48
PROMPTS = [
    "a cat", "a very long prompt, " * 60, "x", " ", "日本語 🐈 über\nzwei Zeilen",
    "b" * (LENGTH - 2), "b" * (LENGTH - 1), "</s> <pad> <|endoftext|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoders(miniature: Path) -> TextEncoders:
    return TextEncoders(miniature, CPU, max_sequence_length=LENGTH)


@pytest.fixture
def copy(miniature: Path, tmp_path: Path) -> Path:
    """The miniature's encoders, to be damaged."""
    for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.copytree(miniature / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What transformers says by way of logging, after its handlers' filters."""
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, listener = logging.getLogger("transformers"), Listener()
    logger.addHandler(listener)
    yield messages
    logger.removeHandler(listener)


@pytest.mark.parametrize(
    "dtype, length",
    [(torch.bfloat16, 512), (torch.bfloat16, LENGTH), (torch.float32, LENGTH), (torch.float32, 1)],
)
def test_the_bits_of_diffusers(miniature, dtype, length):
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(miniature, dtype=dtype, transformer=None, vae=None)
    encoders = TextEncoders(miniature, CPU, dtype, length)
    found = encoders.encode(PROMPTS)
    assert found.prompt_embeds.shape == (len(PROMPTS), length, 32)
    assert found.pooled_embeds.shape == (len(PROMPTS), 32)
    assert found.prompt_embeds.dtype == found.pooled_embeds.dtype == dtype
    assert found.prompt_embeds.isfinite().all() and found.pooled_embeds.isfinite().all()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=length)
        assert torch.equal(found.prompt_embeds[row], embeds[0]), prompt
        assert torch.equal(found.pooled_embeds[row], pooled[0]), prompt


def test_no_prompt_depends_on_those_beside_it(miniature):
    """T = 1 and float32: where a batch in one forward does change bits on CPUs."""
    encoders = TextEncoders(miniature, CPU, torch.float32, 1)
    together = encoders.encode([*PROMPTS, *reversed(PROMPTS)])
    for row, prompt in enumerate([*PROMPTS, *reversed(PROMPTS)]):
        alone = encoders.encode([prompt])
        assert torch.equal(together.prompt_embeds[row], alone.prompt_embeds[0])
        assert torch.equal(together.pooled_embeds[row], alone.pooled_embeds[0])


def test_prompts_differ_and_their_bytes_are_counted(encoders):
    found = encoders.encode(["a cat", "a dog"])
    assert not torch.equal(*found.prompt_embeds) and not torch.equal(*found.pooled_embeds)
    assert 2 * encoders.prompt_bytes == found.prompt_embeds.nbytes + found.pooled_embeds.nbytes
    nothing = encoders.encode([])
    assert nothing.prompt_embeds.shape == (0, LENGTH, 32) and len(nothing.pooled_embeds) == 0


def test_embeddings_can_be_trained_with(encoders):
    """Frozen encoders, but no inference tensors, which autograd could not save."""
    for encoder in (encoders.text_encoder, encoders.text_encoder_2):
        assert not encoder.training
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    weight = torch.ones(32, dtype=torch.bfloat16, requires_grad=True)
    (encoders.encode(["a cat"]).prompt_embeds * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_what_is_cut(encoders, said):
    """A letter is a token, the space before it and the end are two more."""
    assert encoders.too_long(PROMPTS) == ["a very long prompt, " * 60, "b" * (LENGTH - 1)]
    assert encoders.too_long([]) == []
    assert said == []  # transformers warns of such prompts, the first time
    cut = encoders.encode(["b" * (LENGTH - 1), "b" * LENGTH]).prompt_embeds
    assert torch.equal(cut[0], cut[1])


@pytest.mark.parametrize("shown", [True, False])
def test_loading_is_quiet(miniature, capfd, said, shown):
    """And what others set of transformers' progress bars and logging is theirs again."""
    from transformers.utils import logging as theirs

    before = theirs.is_progress_bar_enabled()
    theirs.enable_progress_bar() if shown else theirs.disable_progress_bar()
    handlers = logging.getLogger("transformers").handlers
    filters = [list(handler.filters) for handler in handlers]
    try:
        TextEncoders(miniature, CPU)
        assert theirs.is_progress_bar_enabled() == shown
    finally:
        theirs.enable_progress_bar() if before else theirs.disable_progress_bar()
    assert capfd.readouterr() == ("", "") and said == []
    assert [list(handler.filters) for handler in handlers] == filters


def rewrite(change):
    """Damage to a file of weights: its tensors, changed."""

    def damage(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def other_name(file: Path) -> None:
    file.rename(file.with_name("pytorch_model.bin"))


NORM = "encoder.final_layer_norm.weight"


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("text_encoder", shutil.rmtree, r"text_encoder.config\.json is missing"),
        ("tokenizer_2", shutil.rmtree, r"tokenizer_2.tokenizer_config\.json is missing"),
        ("tokenizer/tokenizer.json", Path.unlink, "tokenizer has no vocabulary; expected tok"),
        ("tokenizer_2/tokenizer.json", Path.unlink, r"tokenizer_2 has no .* or spiece\.model:"),
        ("tokenizer/tokenizer.json", lambda f: f.write_text("{"), "tokenizer cannot be loaded"),
        ("text_encoder/config.json", lambda f: f.write_text("{"), r"text_encoder.config\.json can"),
        ("text_encoder_2/model.safetensors", Path.unlink, "text_encoder_2 has no weights"),
        ("text_encoder_2/model.safetensors", other_name, r"has no weights .*pytorch_model\.bin"),
        ("text_encoder/model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-1]),
         r"text_encoder.model\.safetensors has [\d,]+ bytes; expected"),
        ("text_encoder_2/model.safetensors", rewrite(lambda t: t.pop(NORM)),
         f"text_encoder_2 lacks 1 of its weights, '{NORM}' the first"),
        ("text_encoder_2/model.safetensors", rewrite(lambda t: t.update({NORM: torch.ones(7)})),
         rf"text_encoder_2: '{NORM}' has shape \(7,\); its config.json says \(32,\)"),
    ],
)  # fmt: skip
def test_damaged_components(copy, said, name, damage, message):
    damage(copy / name)
    with pytest.raises(ConfigurationError, match=message):
        TextEncoders(copy, CPU)
    assert said == []  # the error says it


def test_weights_without_use_are_told(copy):
    rewrite(lambda tensors: tensors.update(more=torch.ones(1)))(
        copy / "text_encoder_2" / "model.safetensors"
    )
    with pytest.warns(UserWarning, match="1 weights that a T5EncoderModel has no use for, 'more'"):
        TextEncoders(copy, CPU)


def test_encoders_in_each_others_place(copy):
    (copy / "text_encoder").rename(copy / "other")
    (copy / "text_encoder_2").rename(copy / "text_encoder")
    with pytest.raises(ConfigurationError, match="config.json is of a 't5'; expected 'clip_t"):
        TextEncoders(copy, CPU)


def test_tokenizer_of_another_encoder(copy):
    """It would ask the encoder for rows that it does not have."""
    config = copy / "text_encoder_2" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 70}))
    rewrite(lambda t: t.update({"shared.weight": t["shared.weight"][:70].clone()}))(
        copy / "text_encoder_2" / "model.safetensors"
    )
    with pytest.raises(ConfigurationError, match="_2 knows 79 tokens, its encoder only 70"):
        TextEncoders(copy, CPU)


def test_widths_need_no_weights(copy):
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    assert embedding_widths(copy) == (32, 32)


def test_encoders_visit_the_device(miniature, monkeypatch):
    """On another device there is a copy as long as it takes; what is in host memory never moves."""

    class Elsewhere:
        type = "elsewhere"

    encoders = TextEncoders(miniature, CPU)
    parts = [*encoders.text_encoder.parameters(), *encoders.text_encoder.buffers(),
             *encoders.text_encoder_2.parameters(), *encoders.text_encoder_2.buffers()]  # fmt: skip
    home = [part.data_ptr() for part in parts]
    copies = []
    encoders.device = Elsewhere()
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device: copies.append(device) or tensor.clone()
    )
    with pytest.raises(KeyboardInterrupt), encoders.on_device():
        assert not {part.data_ptr() for part in parts} & set(home)
        with encoders.on_device():
            assert not {part.data_ptr() for part in parts} & set(home)
        assert not {part.data_ptr() for part in parts} & set(home)
        raise KeyboardInterrupt
    assert copies == [encoders.device] * len(parts)
    assert [part.data_ptr() for part in parts] == home


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_encoding_on_a_gpu(miniature):
    encoders = TextEncoders(miniature, torch.device("cuda"), max_sequence_length=LENGTH)
    found = encoders.encode(PROMPTS)
    assert found.prompt_embeds.is_cuda and found.pooled_embeds.is_cuda
    assert encoders.text_encoder_2.device == CPU
    here = TextEncoders(miniature, CPU, max_sequence_length=LENGTH).encode(PROMPTS)
    torch.testing.assert_close(found.prompt_embeds.cpu(), here.prompt_embeds, atol=0.1, rtol=0.1)
    again = encoders.encode(PROMPTS[::-1])
    assert torch.equal(again.prompt_embeds.flip(0), found.prompt_embeds)


def edit_json(file: Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "more": 1}))


def last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name, change",
    [
        ("text_encoder/config.json", edit_json), ("text_encoder_2/model.safetensors", last_byte),
        ("tokenizer/tokenizer.json", edit_json), ("tokenizer_2/tokenizer_config.json", edit_json),
    ],
)  # fmt: skip
def test_fingerprint(miniature, copy, name, change):
    before = fingerprint(miniature)
    assert fingerprint(copy) == before  # wherever it lies
    (copy / "tokenizer" / ".DS_Store").write_text("a desktop's")
    change(copy / name)
    after = fingerprint(copy)
    assert [part for part in before if before[part] != after[part]] == [name.partition("/")[0]]
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in after.values())


def test_what_a_fingerprint_reads_of_large_weights(copy):
    """Both ends: the header, and what a download that was cut short would lack."""
    file = copy / "text_encoder_2" / "model.safetensors"
    save_file({"weight": torch.zeros(300_000, dtype=torch.uint8)}, file)
    before, data = fingerprint(copy)["text_encoder_2"], file.read_bytes()

    def changed(at: int) -> bool:
        file.write_bytes(data[:at] + b"x" + data[at + 1 :])
        return fingerprint(copy)["text_encoder_2"] != before

    assert changed(at=2**16 - 1) and changed(at=len(data) - 2**16) and changed(at=len(data) - 1)
    assert not changed(at=len(data) // 2)


def test_fingerprints_of_other_weights(miniature, tmp_path):
    """The same architecture and tokenizers from another seed."""
    other = fingerprint(write_miniature(tmp_path / "other", seed=1))
    same = [name for name, digest in fingerprint(miniature).items() if other[name] == digest]
    assert same == ["tokenizer", "tokenizer_2"]


def test_which_components_are_present(copy):
    assert present(copy) == ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    (copy / "text_encoder_2" / "model.safetensors").unlink()
    shutil.rmtree(copy / "tokenizer")
    assert present(copy) == ["text_encoder", "tokenizer_2"]
