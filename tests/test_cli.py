"""The command line: help, presets, overrides, and what each mistake is answered with."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import g2rpo
from g2rpo import arguments as args
from g2rpo import cli
from g2rpo.config import Config


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and error of `g2rpo <arguments>`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = cli.main([str(a) for a in arguments])
        except SystemExit as stop:  # jsonargparse's own way out
            code = stop.code or 0
    return code, out.getvalue(), err.getvalue()


def config_of(*arguments: object) -> Config:
    return args.parse_config(args.make_parser(), [str(a) for a in arguments])


def keys(config: object = Config(), prefix: str = "") -> list[str]:
    found = []
    for f in fields(config):
        value = getattr(config, f.name)
        found += keys(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
    return found


def test_help_documents_every_key():
    code, out, _ = call("train", "--help")
    assert code == 0
    text = " ".join(out.split())
    for key in keys():
        start = text.rindex(f"--{key}")
        entry = text[start : text.find(" --", start + 2)]
        help_text = entry.partition("(type:")[0]
        assert len(help_text.split()) > 4, f"{key} has no help: {entry!r}"
    presets = f"Presets: {', '.join(args.preset_names())}."
    assert presets in text.replace("- ", "-")  # where a line ends at a hyphen
    assert "--resume RUN_DIR" in text


def test_usage_and_version():
    assert call()[0] == 2
    code, out, _ = call("--help")
    assert code == 0 and "train PRESET|FILE.yaml" in out
    assert call("--version")[1].strip() == f"g2rpo {g2rpo.__version__}"


def test_defaults_are_the_authors():
    config = Config()
    rollout, optimizer = config.rollout, config.optimizer
    assert (rollout.steps, rollout.shift, rollout.eta, rollout.group_size) == (16, 3.0, 0.7, 12)
    assert rollout.sde_positions == list(range(8)) and rollout.granularities == [1, 2]
    assert (rollout.guidance, rollout.dynamics) == (3.5, "flow")
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (2e-6, (0.9, 0.999), 1e-4)
    assert (config.objective.clip_range, config.objective.advantage_clip) == (1e-4, 5.0)
    assert config.objective.stepping == "accumulate" and optimizer.max_grad_norm == 1.0


@pytest.mark.parametrize("preset", args.preset_names())
def test_presets_are_valid(preset):
    config = config_of("--config", args.find_preset(preset))
    config.validate(training=bool(config.rewards))
    if config.rewards:
        assert [r for r in config.rewards if r.heldout], "a preset shows a judge it never trains on"
    else:
        code, _, err = call("train", preset)
        assert code == 2 and "rewards is []; expected at least one" in err


def test_overrides_win_over_files(tmp_path):
    (tmp_path / "a.yaml").write_text("rollout: {eta: 0.5, group_size: 6}\n")
    config = config_of(
        "--config", args.find_preset("digits"), "--config", tmp_path / "a.yaml",
        "--rollout.group_size", 8, "--rollout.granularities", "[1,3]",
        "--objective.advantage_clip", "null",
    )  # fmt: skip
    assert config.rollout.eta == 0.5 and config.rollout.group_size == 8
    assert config.rollout.granularities == [1, 3] and config.objective.advantage_clip is None
    assert config.model.path == "digits"


def test_resolved_config_reads_back(tmp_path):
    from g2rpo.run import write_config

    config = config_of("--config", args.find_preset("digits"), "--train.seed", 5)
    write_config(config, tmp_path)
    assert config_of("--config", tmp_path / "config.yaml") == config


MISTAKES = {
    "no preset": ([], ["no preset given", "digits"]),
    "unknown preset": (
        ["digts"],
        [f"'digts' is neither a preset, one of {args.preset_names()}, nor"],
    ),
    "unknown key": (["digits", "--train.updats", 3], ["--train.updats"]),
    "no abbreviation": (["digits", "--train.update", 3], ["--train.update"]),
    "wrong type": (["digits", "--train.updates", "abc"], ["train.updates", "int", "abc"]),
    "unknown choice": (["digits", "--rollout.dynamics", "x"], ["rollout.dynamics", "x", "flow"]),
    "ode is no SDE": (["digits", "--rollout.dynamics", "ode"], ["rollout.dynamics", "ode"]),
    "position beyond T-2": (
        ["digits", "--rollout.sde_positions", "[0,15]"],
        ["rollout.sde_positions is [0, 15]", "0 to 14"],
    ),
    "negative position": (["digits", "--rollout.sde_positions", "[-1]"], ["is [-1]; expected"]),
    "no positions": (["digits", "--rollout.sde_positions", "[]"], ["is []; expected at least one"]),
    "position twice": (["digits", "--rollout.sde_positions", "[1,1]"], ["no value twice"]),
    "granularity 0": (["digits", "--rollout.granularities", "[1,0]"], ["[1, 0]", "at least 1"]),
    "one branch": (["digits", "--rollout.group_size", 1], ["group_size is 1", "at least 2"]),
    "no rows": (["digits", "--rollout.branch_batch", 0], ["branch_batch is 0"]),
    "one step": (["digits", "--rollout.steps", 1], ["rollout.steps is 1", "at least 2"]),
    "shift": (["digits", "--rollout.shift", -1], ["rollout.shift is -1", "> 0"]),
    "shift beyond float32": (
        ["digits", "--rollout.shift", 1e9], ["rollout.shift is 1000000000.0", "decreasing sigmas"],
    ),
    "eta": (["digits", "--rollout.eta", 0], ["rollout.eta 0.0", "eta > 0"]),
    "cps eta": (
        ["digits", "--rollout.dynamics", "cps", "--rollout.eta", 1.5],
        ["rollout.eta 1.5", "0 < eta <= 1"],
    ),
    "dpm1 at sigma 1": (
        ["digits", "--rollout.dynamics", "dpm1"],
        ["position 0", "'dpm1' is undefined at sigma = 1"],
    ),
    "clip range": (["digits", "--objective.clip_range", 0], ["objective.clip_range is 0"]),
    "advantage clip": (["digits", "--objective.advantage_clip", -1], ["advantage_clip is -1"]),
    "lr": (["digits", "--optimizer.lr", ".inf"], ["optimizer.lr is inf", "> 0"]),
    "betas": (["digits", "--optimizer.betas", "[0.9, 1.0]"], ["optimizer.betas", "[0, 1)"]),
    "weight decay": (["digits", "--optimizer.weight_decay", ".inf"], ["decay is inf", ">= 0"]),
    "optimizer eps": (["digits", "--optimizer.eps", ".inf"], ["optimizer.eps is inf", "> 0"]),
    "updates": (["digits", "--train.updates", 0], ["train.updates is 0", "at least 1"]),
    "seed": (["digits", "--train.seed", -1], ["train.seed is -1"]),
    "seed of 64 bits": (["digits", "--train.seed", 2**63], ["seed is 9223372036854775808", "2^63"]),
    "preset at the end": (["--train.seed", 1, "digits"], ["no preset given", "before the options"]),
    "lora rank": (["digits", "--model.lora.rank", -1], ["model.lora.rank is -1", "at least 0"]),
    "lora alpha": (["digits", "--model.lora.alpha", 0], ["model.lora.alpha is 0", "> 0"]),
    "kl": (["digits", "--objective.kl", -1], ["objective.kl is -1", ">= 0"]),
    "ema": (["digits", "--train.ema", 1], ["train.ema is 1", "in [0, 1)"]),
    "sequence length": (["digits", "--data.max_sequence_length", 513], ["is 513", "1 to 512"]),
    "max skipped": (["digits", "--train.max_skipped", 0], ["train.max_skipped is 0"]),
    "tracker": (["digits", "--train.tracker", "x"], ["train.tracker", "tensorboard"]),
    "height of digits": (["digits", "--rollout.height", 64], ["rollout.height is 64", "digits"]),
    "weights for digits": (["digits", "--model.transformer", "a"], ["transformer is 'a'", "None"]),
    "attention of digits": (
        ["digits", "--model.attention", "math"], ["model.attention is 'math'; expected 'auto'"],
    ),
    "lora targets": (
        ["digits", "--model.lora.rank", 4, "--model.lora.targets", "[nothing]"],
        ["model.lora.targets is ['nothing']", "linear"],
    ),
    "too many prompts": (["digits", "--train.prompts_per_update", 11], ["is 11", "1 to 10"]),
    "no rewards": (["digits", "--rewards", "[]"], ["rewards is []", "at least one"]),
    "only judges": (
        ["digits", "--rewards", '[{"name": "tiny:contrast", "heldout": true}]'],
        ["at least one of weight > 0 that is not held out"],
    ),
    "negative weight": (
        ["digits", "--rewards",
         '[{"name": "tiny:contrast", "weight": -1}, {"name": "tiny:brightness"}]'],
        ["'tiny:contrast' is -1", ">= 0"],
    ),
    "reward without a function": (
        ["digits", "--rewards", '[{"name": "tiny"}]'], ["'tiny'", "package.module:function"],
    ),
    "reward module": (["digits", "--rewards", '[{"name": "no.such:f"}]'], ["no.such:f", "'no'"]),
    "reward function": (
        ["digits", "--rewards", '[{"name": "tiny:nothing"}]'], ["callable 'nothing' in tiny"],
    ),
    "unknown reward key": (
        ["digits", "--rewards", '[{"name": "tiny:contrast", "wieght": 1}]'], ["wieght"],
    ),
    "model path": (["digits", "--model.path", "cifar"], ["model.path is 'cifar'", "'digits'"]),
    "device": (["digits", "--model.device", "gpu"], ["model.device is 'gpu'"]),
    "prompts file": (["digits", "--data.prompts", "nowhere.txt"], ["is 'nowhere.txt'; expected"]),
    "resume without a run": (["--resume"], ["--resume has no value"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name, tmp_path, monkeypatch):
    """Exit code 2, a message with key, value and expectation, no traceback, nothing written."""
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[name]
    code, out, err = call("train", *arguments)
    assert code == 2, out + err
    for text in expected:
        assert text in " ".join(err.split()), err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, expected", [
    ("rollout: {stepz: 3}", "stepz"),
    ("rollout: 3", "rollout is 3; expected a mapping"),
    ("train: {updates: [1]}", "train.updates"),
    ("a: b: c", "mapping values are not allowed"),
])  # fmt: skip
def test_mistakes_in_a_file(tmp_path, text, expected):
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = call("train", tmp_path / "bad.yaml")
    assert code == 2 and expected in err


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"train: {seed: 1}  # caf\xe9\n")
    code, _, err = call("train", tmp_path / "latin.yaml")
    assert code == 2 and "latin.yaml" in err and "expected UTF-8" in err


def test_interrupted_early(monkeypatch):
    """Ctrl-C before there is anything to save: a line, and the shell's code for it."""

    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("g2rpo.run.start", interrupt)
    code, _, err = call("train", "digits")
    assert code == 130 and err == "g2rpo train: interrupted\n"


def test_prompts_file_of_other_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\na cat\n")
    code, _, err = call("train", "digits", "--data.prompts", tmp_path / "prompts.txt",
                        "--train.output", tmp_path / "run")  # fmt: skip
    assert code == 2 and "'a cat'" in err


def test_every_digits_default_can_be_read():
    """A preset sets nothing the classes do not know, and YAML and dataclass agree on names."""
    values = yaml.safe_load(args.find_preset("digits").read_text())
    for group, settings in values.items():
        if group != "rewards":
            assert set(settings) <= {f.name for f in fields(getattr(Config(), group))}


def test_help_is_quick():
    """`g2rpo --help` does not wait for torch."""
    code = "import sys; from g2rpo import cli; cli.main(['--help']); print('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.strip().endswith("False")


def test_only_training_is_shared_among_processes(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, said in (("0", True), ("2", False)):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["doctor"]) == 2
        error = capsys.readouterr().err
        assert ("started as 4 processes (WORLD_SIZE); expected one" in error) == said
        assert bool(error) == said
