"""Prompt files in their three formats, and which of the prompts a run uses."""

import json
import re

import pytest

from g2rpo.config import Config
from g2rpo.data import (
    PromptSampler,
    prompts_of_run,
    read_evaluation_prompts,
    read_prompts,
)
from g2rpo.errors import ConfigurationError
from g2rpo.seeds import permutation


def config(updates: int, per_update: int = 1, evaluation_samples: int = 1, seed: int = 0) -> Config:
    run = Config()
    run.train.updates, run.train.prompts_per_update = updates, per_update
    run.train.evaluation_samples, run.train.seed = evaluation_samples, seed
    return run


def test_json_lines(tmp_path):
    path = tmp_path / "prompts.JSONL"
    rows = [
        {"id": 1, "prompt": " a cat "}, {"prompt": "two\nlines"}, {"prompt": "a cat"},
        {"prompt": " "}, {"prompt": "a \u2028 separator"}, {"prompt": "日本語 🐈"},
    ]  # fmt: skip
    text = "\ufeff" + "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode())
    expected = ["a cat", "two\nlines", "a \u2028 separator", "日本語 🐈"]
    assert read_prompts(path) == expected
    path.write_text("".join(json.dumps({"text": row["prompt"]}) + "\n" for row in rows))
    assert read_prompts(path, column="text") == expected


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": "b", "id": 3}', "no key 'prompt', only 'text', 'id'; expected data.column to"),
        ("{}", "no key 'prompt', only nothing"),
        ('{"prompt": 7}', "'prompt' is 7; expected text"),
        ('{"prompt": null}', "'prompt' is None; expected text"),
        ('"b"', "expected a JSON object, found '\"b\"'"),
        ('{"prompt": "b"', "expected a JSON object: Expecting"),
        ('{"prompt": "\\ud83d"}', "'prompt' is no valid Unicode"),
    ],
)
def test_wrong_json_lines(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line + "\n")
    expected = re.escape(f"data.prompts is {str(path)!r}; line 3: {message}")
    with pytest.raises(ConfigurationError, match=expected):
        read_prompts(path)


def test_csv(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_bytes(
        "\ufeffid, prompt ,note\r\n"
        '1,"a cat, a dog",x\r\n'
        "\r\n"
        '2,"first line\r\nsecond ""line""",\r\n'
        "3, plain ,\r\n"
        '4,"a cat, a dog",again\r\n'
        "5,,nothing\r\n"
        "6,a\u2028b,\r\n".encode()
    )
    expected = ["a cat, a dog", 'first line\nsecond "line"', "plain", "a\u2028b"]
    assert read_prompts(path) == expected
    assert read_prompts(path, column="note") == ["x", "again", "nothing"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("id,text\n1,b\n", "line 1: no column 'prompt', only 'id', 'text'; expected data.col"),
        ("prompt,prompt\n1,b\n", "line 1: column 'prompt' (data.column) is there more than once"),
        ('id,prompt\n1,"a\nb"\n2,a cat, a dog\n', "line 4: 3 fields under a header of 2"),
        ("id,prompt\n1\n", "line 2: 1 fields under a header of 2"),
        ('id,prompt\n1,a\n2,"b\nc\n', "line 3: expected comma-separated values"),
        ('id,prompt\n1,"a" b\n', "line 2: expected comma-separated values"),
    ],
)
def test_wrong_csv(tmp_path, text, message):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(f"is {str(path)!r}; {message}")):
        read_prompts(path)


@pytest.mark.parametrize("text", ["", "prompt\n", "prompt\n \n"])
def test_no_prompt_at_all(tmp_path, text):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match="which holds no prompt"):
        read_prompts(path)


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "absent.csv"):
        with pytest.raises(ConfigurationError, match=r"expected a file of prompts: text, \.jsonl"):
            read_prompts(path)


@pytest.mark.parametrize("per_update", [1, 3, 7, 10])
def test_sampler_keeps_an_epochs_order_and_nothing_else(per_update):
    """Whatever was asked before, an update's prompts are those of its own epoch's permutation."""
    sampler = PromptSampler([str(i) for i in range(10)], per_update, run_seed=5)
    a_epoch = 10 // per_update
    for update in (1, 2, 30, 29, 2, 11, 1):
        epoch, index = divmod(update - 1, a_epoch)
        expected = permutation(5, epoch, 10)[index * per_update : (index + 1) * per_update]
        assert sampler.ids(update) == expected


@pytest.mark.parametrize(
    "updates, per_update, samples",
    [(1, 1, 1), (7, 1, 5), (60, 1, 3), (9, 7, 1), (2, 20, 64), (1, 1, 64), (500, 11, 2)],
)
def test_prompts_of_a_run(updates, per_update, samples):
    prompts = [f"prompt {i}" for i in range(20)]
    run = config(updates, per_update, samples, seed=3)
    sampler = PromptSampler(prompts, per_update, 3)
    used = [prompts[i % 20] for i in range(samples)]  # the evaluation before the first update
    for update in range(1, updates + 1):
        used += [prompts[i] for i in sampler.ids(update)]
    assert prompts_of_run(run, prompts) == list(dict.fromkeys(used))


def test_prompts_of_a_run_with_prompts_of_evaluations():
    prompts = [f"prompt {i}" for i in range(20)]
    held = ["held 0", "prompt 3", "held 1", "held 2"]
    sampler = PromptSampler(prompts, 2, 3)
    trained = [prompts[i] for update in (1, 2, 3) for i in sampler.ids(update)]
    for samples in (3, 9):  # of the file, those that are drawn
        used = prompts_of_run(config(3, 2, samples, seed=3), prompts, held)
        assert used == list(dict.fromkeys([*held[:samples], *trained]))
    assert set(prompts_of_run(config(50, 2, 1, seed=3), prompts, held)) == {"held 0", *prompts}


def test_a_file_of_evaluation_prompts(tmp_path):
    """Read like that of the prompts, from the same column; errors name its own key."""
    run = Config()
    assert read_evaluation_prompts(run, ["a", "b"]) == ["a", "b"]
    path = tmp_path / "held.jsonl"
    path.write_text('{"caption": " c "}\n{"caption": "d"}\n{"caption": "c"}\n')
    run.data.evaluation_prompts, run.data.column = str(path), "caption"
    assert read_evaluation_prompts(run, ["a", "b"]) == ["c", "d"]
    for suffix, text, fault in (
        (".jsonl", '{"prompt": "c"}', "; line 1: no key 'caption', only 'prompt'"),
        (".csv", "prompt\nc\n", "; line 1: no column 'caption', only 'prompt'"),
        (".txt", "\n", ", which holds no prompt"),
        (".tsv", "c\td", "; expected text, .jsonl or .csv"),
    ):
        path = tmp_path / f"held{suffix}"
        path.write_text(text)
        run.data.evaluation_prompts = str(path)
        message = re.escape(f"data.evaluation_prompts is {str(path)!r}{fault}")
        with pytest.raises(ConfigurationError, match=message):
            read_evaluation_prompts(run, ["a", "b"])


def test_prompts_of_a_long_run_cost_a_permutation_an_epoch(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "g2rpo.data.permutation",
        lambda seed, epoch, size: asked.append(epoch) or permutation(seed, epoch, size),
    )
    prompts = [str(i) for i in range(50_000)]
    used = prompts_of_run(config(10_000, per_update=7, evaluation_samples=32), prompts)
    assert len(used) > 49_994 and asked == [0, 1]
    asked.clear()
    used = prompts_of_run(config(10_000, per_update=16, evaluation_samples=32), prompts)
    assert len(used) == 50_000 and asked == [0]  # all 50,000 were met in the first epoch of four
    asked.clear()
    used = prompts_of_run(config(10_000, per_update=1, evaluation_samples=32), prompts)
    assert 10_000 <= len(used) <= 10_032 and asked == [0]


def test_more_prompts_an_update_than_there_are():
    with pytest.raises(ConfigurationError, match="train.prompts_per_update is 3; expected 1 to 2"):
        prompts_of_run(config(1, per_update=3), ["a", "b"])
