"""What `g2rpo compare` compares: methods, their budgets and runs, and the sweep of a key."""

from itertools import accumulate

import pytest
from comparisons import call, curve
from tiny import TinyModel, brightness, tiny_config

from g2rpo.arguments import differences, make_parser, preset_names
from g2rpo.compare.methods import check_methods, make_method, make_runs, slug, updates_for
from g2rpo.compare.sweep import SWEEP_SEEDS, Sweep
from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward
from g2rpo.sampling import evaluations_of_update
from g2rpo.trainer import Trainer

PARSER = make_parser("compare")
METHODS = [name for name in preset_names() if name.endswith("-digits")]


def method(text: str, *overrides: str):
    return make_method(PARSER, text, overrides)


# Methods


def test_a_method_is_named_by_what_it_changes(tmp_path):
    plain = method("g2rpo-digits")
    assert (plain.label, plain.changed) == ("g2rpo-digits", ())
    changed = method("g2rpo-digits rollout.granularities=[1,3] optimizer.lr=3e-4")
    assert changed.label == "g2rpo-digits granularities=[1,3] lr=3e-4"
    assert changed.changed == ("rollout.granularities=[1,3]", "optimizer.lr=3e-4")
    assert differences(plain.config, changed.config) == {
        "rollout.granularities": ([1, 2], [1, 3]),
        "optimizer.lr": (1e-4, 3e-4),
    }
    quoted = method("g2rpo-digits 'rollout.granularities=[1, 3]' model.dtype=bfloat16")
    assert quoted.label == "g2rpo-digits granularities=[1, 3] dtype=bfloat16"
    assert quoted.config.rollout.granularities == [1, 3]
    file = tmp_path / "two words.yaml"
    file.write_text("optimizer: {lr: 0.5}\nrewards: [{name: 'tiny:brightness'}]\n")
    of_file = method(f"'{file}' data.prompts=a=b.txt")
    assert of_file.label == "two words prompts=a=b.txt"
    assert (of_file.config.optimizer.lr, of_file.config.data.prompts) == (0.5, "a=b.txt")


def test_keys_of_all_methods_come_before_their_own():
    overrides = ("--rollout.eta", "0.5", "--optimizer.lr=0.25")
    found = method("g2rpo-digits rollout.eta=0.6", *overrides).config
    assert (found.rollout.eta, found.optimizer.lr) == (0.6, 0.25)
    assert method("g2rpo-digits", *overrides).config.rollout.eta == 0.5


def test_folders_of_methods_are_plain_names():
    assert slug("g2rpo-digits granularities=[1, 3]") == "g2rpo-digits_granularities=_1_3"
    assert slug("a b=../../etc x=~|*") == "a_b=.._.._etc_x="


@pytest.mark.parametrize(
    "text, message",
    [
        ("nothing", "'nothing' is neither a preset, one of .*'g2rpo-digits'.*, nor a YAML file"),
        ("", "'' is neither a preset"),
        ("rollout.eta=0.5", "begins with a key; expected 'PRESET rollout.eta=0.5', in quotes"),
        ("g2rpo-digits eta", "'g2rpo-digits eta' has 'eta'; expected key=value, as rollout.eta"),
        ("g2rpo-digits rollout.eta=", "has 'rollout.eta='; expected key=value"),
        ("g2rpo-digits --rollout.eta=1", "has '--rollout.eta=1'; expected key=value"),
        ("g2rpo-digits 'a", "'g2rpo-digits \\\\'a|No closing quotation"),
        ("g2rpo-digits rollout.steps=1", "rollout.steps is 1; expected at least 2 steps"),
        ("g2rpo-digits train.updates=9", "train.updates is given; expected --budget"),
        ("g2rpo-digits train.seed=9", "train.seed is given; expected --seeds"),
        ("g2rpo-digits train.output=x", "train.output is given; expected --output"),
        ("g2rpo-digits train.evaluate_every=9", "evaluate_every is given; expected --points"),
    ],
)
def test_wrong_methods(text, message):
    with pytest.raises(ConfigurationError, match=message):
        method(text)


@pytest.mark.parametrize("override", ["--train.seed=3", "--train.updates"])
def test_what_a_comparison_sets_is_no_key_of_all_methods(override):
    with pytest.raises(ConfigurationError, match="is given; expected --"):
        method("g2rpo-digits", override, "3")


def test_unknown_keys_and_wrong_types_are_named():
    for arguments, named in (
        (["g2rpo-digits rollout.etta=1"], "--rollout.etta=1"),
        (["g2rpo-digits rollout.eta=much"], "rollout.eta"),
        (["g2rpo-digits", "--rollout.etta", "1"], "--rollout.etta"),
    ):
        code, out, err = call(*arguments)
        assert code == 2 and named in err and out == ""


def test_equal_methods(tmp_path):
    one, other = method("g2rpo-digits"), method("g2rpo-digits rollout.eta=0.5")
    check_methods([one, other])
    with pytest.raises(ConfigurationError, match="'g2rpo-digits' and 'g2rpo-digits' have one name"):
        check_methods([one, other, one])
    file = tmp_path / "g2rpo-digits.yaml"
    file.write_text("rewards: [{name: 'tiny:brightness'}]\n")
    with pytest.raises(ConfigurationError, match="have one name; .* YAML files of different names"):
        check_methods([one, method(str(file))])
    with pytest.raises(ConfigurationError, match="'g2rpo-digits eta=.70' have one configuration"):
        check_methods([one, method("g2rpo-digits rollout.eta=.70")])


# Budgets


@pytest.mark.parametrize(
    "rollout, kl",
    [
        ({"granularities": [1, 2]}, 0.0),
        ({"sampling": "trajectories", "granularities": [1], "trained_fraction": 0.6}, 0.1),
        ({"granularities": [1], "window": 1, "window_updates": 2}, 0.0),
        ({"granularities": [1], "window": 1, "window_order": "random"}, 0.1),
    ],
)
def test_updates_are_those_nearest_to_the_budget(rollout, kl):
    """Held against rows of forwards that a trainer really makes, update by update."""
    config = tiny_config(**rollout, group_size=2, branch_batch=1)  # no row only fills a batch
    config.objective.kl, config.train.seed = kl, 3
    trainer, rows, counts = Trainer(config, TinyModel(), [Reward("b", brightness)]), 0, []

    def count(module, arguments, keywords):
        nonlocal rows
        rows += len(keywords["timestep"])

    trainer.policy.transformer.register_forward_pre_hook(count, with_kwargs=True)
    for _ in range(5):
        trainer.update()
        counts.append(rows)
    each = [after - before for before, after in zip([0, *counts], counts)]
    assert each == [evaluations_of_update(config, i + 1) for i in range(5)]
    assert len(set(each)) > 1 or config.rollout.window is None
    for budget in range(1, counts[-2], 3):
        nearest = min(range(5), key=lambda i: (abs(counts[i] - budget), -i))
        assert updates_for(config, budget) == (nearest + 1, counts[nearest])


@pytest.mark.parametrize("preset", METHODS)
def test_presets_spend_the_budget(preset):
    config = method(preset).config
    for budget in (20_000, 60_000):
        updates, evaluations = updates_for(config, budget)
        assert evaluations == sum(evaluations_of_update(config, i + 1) for i in range(updates))
        assert abs(evaluations - budget) <= evaluations_of_update(config, updates) / 2


def test_runs_take_turns_and_have_their_own_settings(tmp_path):
    text = "g2rpo-digits rollout.window=2 rollout.window_order=random"
    methods = [method("flow-grpo-digits"), method(text)]
    runs = make_runs(methods, range(3), 60_000, 7, tmp_path)
    assert [run.seed for run in runs] == [0, 0, 1, 1, 2, 2]
    assert [run.method for run in runs] == methods * 3
    assert len({run.directory for run in runs}) == 6
    for run in runs:
        train = run.config.train
        assert train.seed == run.seed and train.output == str(run.directory)
        assert run.directory.parts[-2:] == (slug(run.method.label), f"seed-{run.seed}")
        # by the windows of this very seed
        cumulative = list(accumulate(evaluations_of_update(run.config, i) for i in range(1, 100)))
        assert train.updates == 1 + min(range(99), key=lambda i: abs(cumulative[i] - 60_000))
        assert 6 <= train.updates / train.evaluate_every <= 9
    assert len({run.config.train.updates for run in runs[1::2]}) > 1, "no seed's windows differ"
    assert methods[0].config.train.seed == 0 and methods[0].config.train.output is None


# The sweep


@pytest.mark.parametrize(
    "text, key, values",
    [
        ("optimizer.lr=1e-4,3e-4", "optimizer.lr", ["1e-4", "3e-4"]),
        ("rollout.eta=1", "rollout.eta", ["1"]),
        ("rollout.granularities=[1],[1,2],[1,2,3]", "rollout.granularities",
         ["[1]", "[1,2]", "[1,2,3]"]),
    ],
)  # fmt: skip
def test_sweeps_are_read(text, key, values):
    sweep = Sweep.parse(text)
    assert (sweep.key, sweep.values) == (key, values)


@pytest.mark.parametrize("text", ["optimizer.lr", "=1", "lr=", "lr=1,,2", "lr=1,1"])
def test_wrong_sweeps(text):
    code, _, err = call("g2rpo-digits", "--sweep", text)
    assert code == 2 and f"--sweep is {text!r}; expected KEY=VALUE,VALUE,..." in err


def swept(rewards: dict[str, tuple[float, float]], judge: dict[str, float] | None = None):
    """A sweep over the keys of `rewards`, in which runs end with these, seed by seed."""
    sweep = Sweep("optimizer.lr", list(rewards))
    variants = sweep.variants(PARSER, ["g2rpo-digits rollout.eta=0.5"], ())
    curves = [
        curve(variant.label, seed, reward__fit=[0.9, end],
              heldout__judge=[0.5, (judge or {}).get(value, 0.5)])
        for value, variant in zip(rewards, variants)
        for seed, end in zip(SWEEP_SEEDS, rewards[value])
    ]  # fmt: skip
    methods = [method("g2rpo-digits rollout.eta=0.5")]
    return sweep, sweep.choose(methods, variants, curves[::-1], "fit")


def test_the_sweep_chooses_by_the_trained_reward_alone():
    rewards = {"1e-4": (0.6, 0.7), "3e-4": (0.9, 0.5), "1e-3": (0.1, 0.2)}
    sweep, (chosen,) = swept(rewards, judge={"1e-4": 0.9, "3e-4": 0.1, "1e-3": 1.0})
    assert chosen.label == "g2rpo-digits eta=0.5"  # in tables it keeps its name
    assert (chosen.config.optimizer.lr, chosen.config.rollout.eta) == (3e-4, 0.5)
    assert chosen.changed == ("rollout.eta=0.5", "optimizer.lr=3e-4")
    assert sweep.chosen == {"g2rpo-digits eta=0.5": "3e-4"}
    found = sweep.reached["g2rpo-digits eta=0.5"]
    assert found == pytest.approx({"1e-4": 0.65, "3e-4": 0.7, "1e-3": 0.15})
    sentence = sweep.sentence("fit")
    assert "that of the highest fit at the end, on seeds 1000 and 1001" in sentence
    assert "optimizer.lr=3e-4 (0.650 with 1e-4, 0.700 with 3e-4, 0.150 with 1e-3)" in sentence


def test_a_value_that_fails_on_a_seed_is_not_chosen():
    _, (chosen,) = swept({"1e-4": (0.1, 0.2), "3e-4": (0.99, float("nan"))})
    assert chosen.config.optimizer.lr == 1e-4
    with pytest.raises(ConfigurationError, match="1e-3, 1e-2; expected a value of optimizer.lr"):
        swept({"1e-3": (float("nan"), 0.5), "1e-2": (0.5, float("nan"))})
