"""`g2rpo embed` from the outside: what it says, what it leaves behind, and how it goes on."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from rich.console import Console

from g2rpo.config import Config
from g2rpo.data import prompts_of_run, read_evaluation_prompts
from g2rpo.errors import ConfigurationError
from g2rpo.flux import embed as module
from g2rpo.flux.embed import embed
from g2rpo.flux.miniature import write_miniature
from g2rpo.flux.model import load_flux
from g2rpo.flux.store import EmbeddingStore
from g2rpo.flux.text import TextEncoders

CPU = torch.device("cpu")
LENGTH = 24
PROMPT_BYTES = (LENGTH * 32 + 32) * 2
PROMPTS = [f"prompt number {i}" for i in range(30)]


@pytest.fixture
def config(miniature: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of 10 updates, a prompt each; shards of up to 4 prompts."""
    monkeypatch.setattr(module, "SHARD_BYTES", 4 * PROMPT_BYTES)
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, PROMPTS[0]]))
    run = Config()
    run.model.path, run.model.device = str(miniature), "cpu"
    run.data.prompts, run.data.embeddings = str(tmp_path / "prompts.txt"), str(tmp_path / "stored")
    run.data.max_sequence_length = LENGTH
    run.train.updates, run.train.evaluation_samples = 10, 2
    return run


def stored(config: Config) -> EmbeddingStore:
    return EmbeddingStore.open(config.data.embeddings)


def as_training_would(config: Config, store: EmbeddingStore, prompts: list[str]) -> bool:
    """What is stored is what the encoders give, bit for bit."""
    encoders = TextEncoders(Path(config.model.path), CPU, max_sequence_length=LENGTH)
    one, other = store.read(prompts, CPU), encoders.encode(prompts)
    return torch.equal(one.prompt_embeds, other.prompt_embeds) and torch.equal(
        one.pooled_embeds, other.pooled_embeds
    )


def refuse(*arguments: object, **keywords: object) -> None:
    raise AssertionError("the text encoders are not needed")


def test_prompts_of_a_run_then_everything(config, capsys, monkeypatch):
    used = prompts_of_run(config, PROMPTS)
    n = len(used)
    assert 10 <= n <= 12
    assert embed(config) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"{n} of 30 prompts will be used by 10 updates and the evaluations; 0 are there already; "
        rf"{n} x 1\.6 kB = {n * 1.6:.3g} kB to write into {config.data.embeddings} \(.+B free\)",
        lines[0],
    )
    assert lines[1] == f"Loading the text encoders of {config.model.path}"
    end = rf"Embedded {n} prompts in .* s; .*stored holds {n} prompts, .*kB in 3 shards"
    assert re.fullmatch(end, lines[2]) and len(lines) == 3
    store = stored(config)
    assert [prompt for shard in store.shards for prompt in shard.prompts] == used
    assert as_training_would(config, store, used[::-1])

    with monkeypatch.context() as patch:
        patch.setattr(module, "TextEncoders", refuse)
        assert embed(config) == 0
    assert capsys.readouterr().out == (
        f"{n} of 30 prompts will be used by 10 updates and the evaluations; all are in "
        f"{config.data.embeddings} already: nothing to embed\n"
    )

    assert embed(config, everything=True) == 0
    assert re.match(
        rf"All 30 prompts of .*prompts\.txt; {n} are there already; {30 - n} x 1\.6 kB = ",
        capsys.readouterr().out,
    )
    store = stored(config)
    assert [prompt for shard in store.shards for prompt in shard.prompts][:n] == used
    assert len(store) == 30 == sum(len(shard.prompts) for shard in store.shards)
    assert as_training_would(config, store, PROMPTS)


def test_prompts_of_the_evaluations(config, capsys, tmp_path):
    """Are embedded with those that are trained on, and asked for by the run."""
    held = tmp_path / "held.txt"
    held.write_text(f"unseen one\n{PROMPTS[3]}\nunseen two\n")
    before = prompts_of_run(config, PROMPTS)
    assert embed(config) == 0
    config.data.evaluation_prompts = str(held)
    used = prompts_of_run(config, PROMPTS, read_evaluation_prompts(config, PROMPTS))
    assert used[:2] == ["unseen one", PROMPTS[3]] and "unseen two" not in used
    config.rollout.height = config.rollout.width = 32
    with pytest.raises(ConfigurationError, match="lacks .* this run will use, the first 'unseen o"):
        load_flux(config, on_message=lambda text: None)
    capsys.readouterr()
    assert embed(config) == 0
    new = len(set(used) - set(before))
    assert f"{len(used)} of 32 prompts will be used by 10 updates and the evaluations; " in (
        out := capsys.readouterr().out
    )
    assert f"; {new} x 1.6 kB" in out and stored(config).missing(used) == []
    model = load_flux(config, on_message=lambda text: None)
    assert model.evaluation_prompts == ["unseen one", PROMPTS[3], "unseen two"]
    assert model.prompts == PROMPTS and len(model.embed(["unseen one"])) == 1

    assert embed(config, everything=True) == 0
    assert f"All 32 prompts of {config.data.prompts} and {held}; " in capsys.readouterr().out
    assert stored(config).missing([*PROMPTS, "unseen one", "unseen two"]) == []


def test_prompts_from_csv(config, capsys, tmp_path):
    """Prompts with newlines, commas and quotes; some with more tokens than there is room for."""
    file = tmp_path / "prompts.csv"
    prompts = ["two\nlines", "a cat, a dog", 'say "x"', "c" * (LENGTH - 2), "c" * (LENGTH - 1)]
    rows = [f'{i},"{prompt.replace(chr(34), chr(34) * 2)}"' for i, prompt in enumerate(prompts)]
    file.write_text("\n".join(["id,text", *rows]))
    config.data.prompts, config.data.column = str(file), "text"
    assert embed(config, everything=True) == 0
    assert (
        f"1 of them has more than {LENGTH} T5 tokens (data.max_sequence_length) and will be cut, "
        f"the first: {'c' * (LENGTH - 1)!r}\n" in capsys.readouterr().out
    )
    assert stored(config).missing(prompts) == []
    assert as_training_would(config, stored(config), prompts)


# The first run meets a limit of the operating system, the second is killed at its third shard.
CUT_SHORT = """
import os, resource, sys
from g2rpo.config import Config
from g2rpo.errors import TrainingError
from g2rpo.flux import embed as module, writer

config = Config()
config.model.path, config.data.prompts, config.data.embeddings = sys.argv[1:4]
config.model.device, config.data.max_sequence_length = "cpu", int(sys.argv[4])
module.SHARD_BYTES = int(sys.argv[5])
sys.dont_write_bytecode = True  # or what is imported now would be cut short in its cache
usual = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))
try:
    module.embed(config, everything=True)
except TrainingError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, usual)
write_beside = writer.write_beside

def killed(path, data):
    if path.name == "shard-00002.safetensors":
        path.with_name(f".{path.name}.tmp").write_bytes(data[:100])
        sys.stdout.flush()
        os._exit(9)
    write_beside(path, data)

writer.write_beside = killed
module.embed(config, everything=True)
"""


def test_a_disk_that_fails_and_a_kill(config, capsys):
    """Both in a process of their own; what whole shards hold is not embedded again."""
    arguments = [config.model.path, config.data.prompts, config.data.embeddings, LENGTH,
                 4 * PROMPT_BYTES]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", CUT_SHORT, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 9, done.stderr
    refused = next(line for line in done.stdout.splitlines() if line.startswith("refused:"))
    assert re.search(r"could not take a shard of 6\.\d+ kB .* free\): .*File too large", refused)
    assert "The 0 prompts there stay valid; make room" in refused
    folder = Path(config.data.embeddings)
    left = {p.name for p in folder.iterdir()}
    assert {"shard-00000.safetensors", "shard-00001.safetensors"} <= left
    assert ".shard-00002.safetensors.tmp" in left
    assert len(stored(config)) == 8  # training could read them now
    before = (folder / "shard-00000.safetensors").read_bytes()
    assert embed(config, everything=True) == 0
    assert "; 8 are there already; 22 x 1.6 kB = " in capsys.readouterr().out
    assert not list(folder.glob(".*.tmp"))
    assert (folder / "shard-00000.safetensors").read_bytes() == before
    assert as_training_would(config, stored(config), PROMPTS)


def test_ctrl_c(config, capsys, monkeypatch):
    encode, calls = TextEncoders.encode, []

    def interrupted(encoders, prompts):
        calls.extend(prompts)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return encode(encoders, prompts)

    monkeypatch.setattr(TextEncoders, "encode", interrupted)
    assert embed(config, everything=True) == 130
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"Stopped; 8 prompts in {config.data.embeddings} are kept. The same command goes on from "
        "there"
    )
    assert stored(config).missing(PROMPTS) == PROMPTS[8:]
    assert embed(config, everything=True) == 0
    assert calls[11:] == PROMPTS[8:]


def test_damaged_shards_are_embedded_again(config, capsys, tmp_path):
    assert embed(config, everything=True) == 0
    folder = Path(config.data.embeddings)
    whole = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    (folder / "shard-00001.safetensors").write_bytes(whole["shard-00001.safetensors"][:-1])
    (folder / "shard-00003.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="shard-00001.safetensors has .* `g2rpo embed`"):
        stored(config)
    capsys.readouterr()
    # another prompt beside them, and none of theirs: they are made whole all the same
    (tmp_path / "prompts.txt").write_text("something else")
    assert embed(config, everything=True) == 0
    lines = capsys.readouterr().out.splitlines()
    at = re.escape(str(folder / "shard-0000"))
    assert re.fullmatch(
        rf"{at}1\.safetensors has [\d,]+ bytes; expected [\d,]+: its 4 prompts are embedded again",
        lines[0],
    )
    assert lines[1].endswith("3.safetensors is missing: its 4 prompts are embedded again")
    assert lines[2].startswith("All 1 prompt of ") and "; 0 are there already; 9 x 1.6" in lines[2]
    assert stored(config).missing([*PROMPTS, "something else"]) == []
    for name, data in whole.items():
        assert (folder / name).read_bytes() == data


def test_nothing_missing_but_a_damaged_shard(config, capsys):
    assert embed(config) == 0
    (Path(config.data.embeddings) / "shard-00000.safetensors").unlink()
    n = len(prompts_of_run(config, PROMPTS))
    capsys.readouterr()
    assert embed(config) == 0
    assert f"; {n - 4} are there already; 4 x 1.6 kB = " in capsys.readouterr().out
    assert as_training_would(config, stored(config), prompts_of_run(config, PROMPTS))


def test_other_encoders_are_refused(config, tmp_path, monkeypatch):
    assert embed(config) == 0
    before = {file.name: file.read_bytes() for file in Path(config.data.embeddings).iterdir()}
    monkeypatch.setattr(module, "TextEncoders", refuse)
    config.data.max_sequence_length = LENGTH + 1
    with pytest.raises(ConfigurationError, match=f"max_sequence_length {LENGTH}; data.max_"):
        embed(config, everything=True)
    config.data.max_sequence_length = LENGTH
    config.model.path = str(write_miniature(tmp_path / "other", seed=1))
    message = "made with other text encoders than those of .*other: text_encoder, text_encoder_2 d"
    with pytest.raises(ConfigurationError, match=message):
        embed(config, everything=True)
    with pytest.raises(ConfigurationError, match=message):
        stored(config).check(tmp_path / "other", LENGTH)
    after = {file.name: file.read_bytes() for file in Path(config.data.embeddings).iterdir()}
    assert before == after


def test_a_disk_that_is_too_small(config, capsys, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    free = 30 * PROMPT_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, free - 1))
    with monkeypatch.context() as patch:
        patch.setattr(module, "TextEncoders", refuse)
        message = "on a disk with 48 kB free; expected the 48 kB that 30 prompts take: make room"
        with pytest.raises(ConfigurationError, match=message):
            embed(config, everything=True)
    assert "30 x 1.6 kB = 48 kB to write into" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, free))
    assert embed(config, everything=True) == 0


def test_a_gpu_that_is_too_small(config, monkeypatch):
    def too_large(encoders: TextEncoders, prompts: list[str]) -> None:
        raise torch.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(TextEncoders, "encode", too_large)
    message = "model.device is 'cpu', where the text encoders do not fit; .* to allocate 9 GiB"
    with pytest.raises(ConfigurationError, match=message):
        embed(config)
    monkeypatch.undo()
    assert embed(config) == 0  # nobody holds the folder any more


def test_only_text_encoders_are_needed(config, tmp_path):
    """No transformer, no autoencoder: they are not even looked at."""
    folder = tmp_path / "texts"
    shutil.copytree(
        config.model.path, folder, ignore=shutil.ignore_patterns("transformer", "vae", "scheduler")
    )
    config.model.path = str(folder)
    assert embed(config) == 0
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="text_encoder_2 has no weights"):
        embed(config)


@pytest.mark.parametrize(
    "group, key, value, message",
    [
        ("model", "path", "digits", "model.path is 'digits', whose prompts need no embedding"),
        ("data", "prompts", None, "data.prompts is null; expected the file of prompts"),
        ("data", "embeddings", None, "data.embeddings is null; expected the folder to fill"),
        ("data", "max_sequence_length", 513, "data.max_sequence_length is 513; expected 1 to 512"),
        ("train", "prompts_per_update", 31, "train.prompts_per_update is 31; expected 1 to 30"),
        ("model", "path", "nowhere/at/all", "model.path is 'nowhere/at/all'"),
        ("model", "device", "cuda:77", "model.device is 'cuda:77'; expected a device"),
    ],
)
def test_keys_that_cannot_be(config, group, key, value, message):
    setattr(getattr(config, group), key, value)
    with pytest.raises(ConfigurationError, match=message):
        embed(config)


def test_plain_lines(config, capsys, monkeypatch):
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    assert embed(config) == 0
    out = capsys.readouterr().out
    n = len(prompts_of_run(config, PROMPTS))
    lines = re.findall(r"^\d+/\d+ prompts  [\d.e+]+ prompts/s  eta \d+:\d\d$", out, re.MULTILINE)
    assert [line.split()[0] for line in lines] == [f"{i}/{n}" for i in range(1, n + 1)]
    assert "\x1b" not in out


def test_bar_on_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr(module, "Console", lambda: Console(force_terminal=True, width=80))
    assert embed(config) == 0
    out = capsys.readouterr().out
    n = len(prompts_of_run(config, PROMPTS))
    assert f"{n}/{n}" in out and "\x1b[" in out and "prompts/s" not in out


def test_the_command_line_reaches_it(config, capsys, tmp_path):
    from g2rpo.cli import main

    (tmp_path / "run.yaml").write_text(
        "rewards: [{name: 'tiny:brightness'}]\n"
        f"data: {{prompts: {config.data.prompts}, max_sequence_length: {LENGTH}}}\n"
    )
    arguments = ["embed", str(tmp_path / "run.yaml"), "--model.path", config.model.path,
                 "--model.device", "cpu"]  # fmt: skip
    assert main([*arguments, "--everything"]) == 2
    assert "g2rpo embed: error: data.embeddings is null" in capsys.readouterr().err
    arguments += ["--data.embeddings", config.data.embeddings]
    assert main([*arguments, "--everything"]) == 0
    assert len(stored(config)) == 30
