"""Stored embeddings: what is written is what is read, and whatever is not whole is told."""

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.flux.store import INDEX, EmbeddingStore, Maker
from g2rpo.flux.text import fingerprint
from g2rpo.flux.writer import writing
from g2rpo.metrics import size
from g2rpo.policy import Conditions

CPU = torch.device("cpu")
MAKER = Maker(3, (4, 2), "bfloat16", {"text_encoder": "aa", "text_encoder_2": "bb"})


def conditions(prompts: list[str]) -> Conditions:
    """Of every prompt its own, reproducible."""
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(torch.randn(3 * 4 + 2, generator=generator).bfloat16())
    table = torch.stack(rows)
    return Conditions(table[:, :12].reshape(-1, 3, 4), table[:, 12:])


def fill(folder: Path, *shards: str, maker: Maker = MAKER) -> Path:
    """A store with a shard for every string, whose words are its prompts."""
    with writing(folder, maker, "a model") as store:
        for words in shards:
            store.add(words.split(), conditions(words.split()))
    return folder


def same(found: Conditions, prompts: list[str]) -> bool:
    expected = conditions(prompts)
    return torch.equal(found.prompt_embeds, expected.prompt_embeds) and torch.equal(
        found.pooled_embeds, expected.pooled_embeds
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "deep" / "embeddings", "a b c", "d", "e f")


def test_rows_in_any_order(folder):
    store = EmbeddingStore.open(folder)
    for prompts in (["a"], list("fbdace"), list("eea"), list("cba")):
        assert same(store.read(prompts, CPU), prompts)
    assert store.read([], CPU).prompt_embeds.shape == (0, 3, 4)
    assert len(store) == 6 and "d" in store and "g" not in store
    assert store.missing(list("xaxbdy")) == ["x", "y"]
    assert (store.max_sequence_length, store.fingerprint) == (3, MAKER.fingerprint)
    assert store.maker == MAKER and MAKER.prompt_bytes == 28
    names = ["index.json", *(f"shard-0000{i}.safetensors" for i in range(3))]
    assert sorted(p.name for p in folder.iterdir() if p.name != ".lock") == names


def test_only_rows_asked_for_are_read(folder, monkeypatch):
    """By the slices that are taken of a shard: a whole one would be a quarter of a gigabyte."""
    from g2rpo.flux import store as module

    taken = []

    class Watched:
        def __init__(self, *arguments, **keywords):
            self.opened = module_open(*arguments, **keywords)

        def __enter__(self):
            self.file = self.opened.__enter__()
            return self

        def __exit__(self, *exception):
            return self.opened.__exit__(*exception)

        def metadata(self):
            return self.file.metadata()

        def get_slice(self, name):
            stored = self.file.get_slice(name)

            class Slice:
                get_dtype, get_shape = stored.get_dtype, stored.get_shape

                def __getitem__(self, index):
                    taken.append((name, index))
                    return stored[index]

            return Slice()

    module_open = module.safe_open
    monkeypatch.setattr(module, "safe_open", Watched)
    assert same(EmbeddingStore.open(folder).read(["f", "b"], CPU), ["f", "b"])
    rows = [("prompt_embeds", slice(1, 2)), ("pooled_embeds", slice(1, 2))]
    assert taken == rows + rows  # the second row of either shard


def test_prompts_of_any_kind(tmp_path):
    prompts = ["two\nlines", 'with "quotes"', "日本語 🐈", "\u2028", " "]
    with writing(tmp_path, MAKER, "a model") as store:
        store.add(prompts, conditions(prompts))
    assert same(EmbeddingStore.open(tmp_path).read(prompts[::-1], CPU), prompts[::-1])


def test_prompts_that_are_not_there(folder):
    with pytest.raises(ConfigurationError, match="lacks 2 prompts of this run, the first 'x'; run"):
        EmbeddingStore.open(folder).read(["a", "x", "y"], CPU)


def test_no_store(tmp_path):
    with pytest.raises(ConfigurationError, match="there is no index.json; expected a folder that"):
        EmbeddingStore.open(tmp_path)


def swap(file: Path) -> None:
    """Shards of the same shape, each whole, in each other's place."""
    other = fill(file.parent.parent / "other", "x y z") / "shard-00000.safetensors"
    file.write_bytes(other.read_bytes())


def reshape(file: Path) -> None:
    """A whole file of as many bytes, in another shape."""
    data = file.read_bytes()
    file.write_bytes(data.replace(b"[3,3,4]", b"[3,4,3]"))
    assert file.read_bytes() != data


@pytest.mark.parametrize(
    "damage, message",
    [
        (Path.unlink, "is missing"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"has \d+ bytes; expected \d+"),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), r"has \d+ bytes; expected \d+"),
        (lambda file: file.write_bytes(b"x" * file.stat().st_size), "cannot be read"),
        (reshape, r"holds \{.*\(.BF16., 3, 4, 3\).*expected .*\(.BF16., 3, 3, 4\)"),
        (swap, "holds embeddings of other prompts, or by other encoders"),
    ],
)
def test_shards_that_are_not_whole(folder, damage, message):
    file = folder / "shard-00000.safetensors"
    store = EmbeddingStore.open(folder)
    damage(file)
    expected = re.escape(str(file)) + " " + message + ".*; remove it and run `g2rpo embed` again, "
    with pytest.raises(ConfigurationError, match=expected + "which embeds its 3 prompts once more"):
        EmbeddingStore.open(folder)
    with pytest.raises(ConfigurationError, match=expected):  # damaged while training
        store.read(["b"], CPU)
    assert same(store.read(["f"], CPU), ["f"])
    with writing(folder, MAKER, "a model") as store:
        assert [shard.file for shard in store.faults()] == [file.name]
        (shard,) = store.faults()
        store.replace(shard, conditions(list(shard.prompts)))
    mended = EmbeddingStore.open(folder)
    assert [shard.file[:11] for shard in mended.shards] == [f"shard-0000{i}" for i in range(3)]
    assert same(mended.read(list("abcdef"), CPU), list("abcdef"))


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda index: "{", "JSONDecodeError"),
        (lambda index: [], "TypeError"),
        (lambda index: {**index, "format": 2}, "its format is 2; this version reads 1"),
        (lambda index: {**index, "dtype": "int8"}, "its dtype is 'int8'; expected one of"),
        (lambda index: {**index, "widths": [4]}, "ValueError"),
        (lambda index: {k: v for k, v in index.items() if k != "shards"}, "KeyError: 'shards'"),
        (lambda index: {**index, "shards": [{"file": "../../a", "bytes": 1, "prompts": []}]},
         r"it names the file '\.\./\.\./a'"),
    ],
)  # fmt: skip
def test_damaged_index(folder, edit, message):
    file = folder / INDEX
    edited = edit(json.loads(file.read_text()))
    file.write_text(edited if isinstance(edited, str) else json.dumps(edited))
    expected = re.escape(str(file)) + " cannot be used .*" + message + ".*; remove .* and run"
    with pytest.raises(ConfigurationError, match=expected):
        EmbeddingStore.open(folder)
    with pytest.raises(ConfigurationError, match=expected), writing(folder, MAKER, "a model"):
        pass


@pytest.mark.parametrize("nth", [1, 2], ids=["shard", "index"])
def test_killed_while_writing(folder, monkeypatch, nth):
    """Before a shard's rename or before the index's: the shard in progress is lost, no other."""
    calls = []

    def cut_short(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) > nth:
            Path(path).with_name(f".{Path(path).name}.tmp").write_bytes(data[:10])
            raise KeyboardInterrupt
        write_beside(path, data)

    from g2rpo.flux import writer

    write_beside = writer.write_beside
    with pytest.raises(KeyboardInterrupt), writing(folder, MAKER, "a model") as store:
        monkeypatch.setattr(writer, "write_beside", lambda *both: cut_short(*both))
        calls.append(None)
        store.add(["g"], conditions(["g"]))
    monkeypatch.undo()
    left = {p.name for p in folder.iterdir()} - {".lock"}
    assert len(left) == 4 + nth  # something was left behind
    assert same(EmbeddingStore.open(folder).read(list("abcdef"), CPU), list("abcdef"))
    with writing(folder, MAKER, "a model") as store:
        assert len({p.name for p in folder.iterdir()} - {".lock"}) == 4
        store.add(["g"], conditions(["g"]))
    assert same(EmbeddingStore.open(folder).read(list("abcdefg"), CPU), list("abcdefg"))


def test_folders_of_others_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "shard-00000.safetensors").write_text("somebody's")
    message = "where there is 'shard-00000.safetensors' and no index.json; expected a new or empty"
    with pytest.raises(ConfigurationError, match=message), writing(tmp_path, MAKER, "a model"):
        pass
    assert {p.name for p in tmp_path.iterdir()} >= {"thesis.txt", "shard-00000.safetensors"}
    with pytest.raises(ConfigurationError, match="thesis.txt'; expected a folder that can be made"):
        fill(tmp_path / "thesis.txt")


def test_one_writer_at_a_time(folder):
    with FileLock(folder / ".lock"):
        with pytest.raises(ConfigurationError, match="where another `g2rpo embed` is writing"):
            fill(folder, "g")
        assert len(EmbeddingStore.open(folder)) == 6  # reading needs no lock
    assert len(EmbeddingStore.open(fill(folder, "g"))) == 7


def test_stores_are_not_mixed(folder):
    longer = Maker(5, *list(vars(MAKER).values())[1:])
    with pytest.raises(ConfigurationError, match="made with max_sequence_length 3; data.max_sequ"):
        fill(folder, "g", maker=longer)
    other = Maker(*list(vars(MAKER).values())[:3], {"text_encoder": "aa", "text_encoder_2": "cc"})
    message = "made with other text encoders than those of a model: text_encoder_2 differ"
    with pytest.raises(ConfigurationError, match=message):
        fill(folder, "g", maker=other)
    assert len(EmbeddingStore.open(folder)) == 6
    empty = fill(folder.parent / "empty")
    assert EmbeddingStore.open(fill(empty, "g", maker=other)).maker == other  # nothing to mix with


def test_check_against_a_pipeline(miniature, tmp_path):
    prints = fingerprint(miniature)
    store = EmbeddingStore.open(
        fill(tmp_path / "same", "a", maker=Maker(3, (4, 2), "bfloat16", prints))
    )
    store.check(miniature, 3)
    with pytest.raises(ConfigurationError, match="data.max_sequence_length is 4: expected the"):
        store.check(miniature, 4)
    store.check(tmp_path / "nowhere", 3)  # encoders that are not there are not needed
    prints["tokenizer_2"] = "0"
    other = EmbeddingStore.open(
        fill(tmp_path / "other", "a", maker=Maker(3, (4, 2), "bfloat16", prints))
    )
    with pytest.raises(ConfigurationError, match=f"{miniature}: tokenizer_2 differ"):
        other.check(miniature, 3)


@pytest.mark.parametrize("at", ["shard-00003.safetensors", INDEX])
def test_a_disk_that_is_full(folder, monkeypatch, at):
    from g2rpo.flux.writer import write_beside

    def full(path: Path, data: bytes) -> None:
        if path.name != at:
            return write_beside(path, data)
        path.with_name(f".{path.name}.tmp").write_bytes(data[:5])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with writing(folder, MAKER, "a model") as store:
        monkeypatch.setattr("g2rpo.flux.writer.write_beside", full)
        message = (
            rf"{folder} could not take a shard of \d+ B \(.* are free\): .*No space left.*"
            "The 6 prompts there stay valid; make room, then run `g2rpo embed` again"
        )
        with pytest.raises(TrainingError, match=message):
            store.add(["g"], conditions(["g"]))
        assert "g" not in store
    assert len({p.name for p in folder.iterdir()} - {".lock"}) == 4  # no room is taken up
    assert len(EmbeddingStore.open(folder)) == 6


LIMITED = """
import resource, sys, torch
from g2rpo.flux.store import Maker
from g2rpo.flux.writer import writing
from g2rpo.policy import Conditions

def rows(n):
    return Conditions(torch.ones(n, 3, 4).bfloat16(), torch.ones(n, 2).bfloat16())

with writing(sys.argv[1], Maker(3, (4, 2), "bfloat16", {}), "a model") as store:
    store.add(["a"], rows(1))
    sys.dont_write_bytecode = True  # or what is imported now would be cut short in its cache
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    store.add([f"prompt {i}" for i in range(1000)], rows(1000))
"""


def test_a_write_that_fails(tmp_path):
    """A real error of the operating system, in the middle of a file."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"TrainingError: .* take a shard of 28\.\d kB .*File too large", last)
    assert {p.name for p in tmp_path.iterdir()} == {".lock", INDEX, "shard-00000.safetensors"}
    assert EmbeddingStore.open(tmp_path).missing(["a", "prompt 0"]) == ["prompt 0"]


@pytest.mark.parametrize(
    "bytes, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4_195_840, "4.2 MB"), (12_890_000_000, "12.9 GB"),
     (80_000_000_000, "80 GB"), (999_600_000, "1 GB"), (99_960_000, "100 MB"),
     (5 * 10**15, "5000 TB")],
)  # fmt: skip
def test_sizes(bytes, text):
    assert size(bytes) == text
