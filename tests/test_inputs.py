"""Seeds, prompts, rewards and checkpoints: the small rooms around the trainer."""

import math

import numpy as np
import pytest
import torch
from tiny import TinyModel, brightness, tiny_config

from g2rpo.checkpoint import MANIFEST, list_checkpoints, load_checkpoint, save_checkpoint
from g2rpo.data import PromptSampler, read_prompts
from g2rpo.errors import ConfigurationError, TrainingError
from g2rpo.objective import integrate_advantages
from g2rpo.rewards import Reward, import_reward, reward_name, score
from g2rpo.scoring import diversity
from g2rpo.seeds import anchor_seeds, branch_seeds, evaluation_seeds, hash_seed, splitmix64
from g2rpo.trainer import Trainer
from g2rpo.weights import FullWeights

MASK = 2**64 - 1


def splitmix_integers(state: int) -> int:
    """Vigna's splitmix64 in Python's own integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def chain(*parts: int) -> int:
    state = 0
    for part in parts:
        state = splitmix_integers(state ^ (part & MASK))
    return state - 2**64 if state >= 2**63 else state


def test_splitmix_known_values():
    """First outputs of the reference implementation for seed 0 and 1234567."""
    assert splitmix_integers(0) == 0xE220A8397B1DCDAF
    assert splitmix_integers(1234567) == 6457827717110365317
    states = np.array([0, 1234567, 2**64 - 1], dtype=np.uint64)
    assert splitmix64(states).tolist() == [splitmix_integers(int(s)) for s in states]


def test_seeds_are_the_documented_chain():
    seeds = branch_seeds(3, 17, [5, 900], [6], 12)[0]
    assert seeds.shape == (2, 12) and seeds.dtype == torch.int64
    for row, prompt in enumerate((5, 900)):
        assert seeds[row].tolist() == [chain(3, 17, prompt, 6, g) for g in range(12)]
    assert anchor_seeds(3, 17, [5]).tolist() == [chain(3, 17, 5, -1, 0)]
    assert evaluation_seeds(3).tolist() == [chain(0, -1, 0, -1, i) for i in range(3)]
    assert hash_seed(2**40, -7).tolist() == [chain(2**40, -7)]


def test_seeds_do_not_collide():
    drawn = [evaluation_seeds(500).flatten()]
    for seed in (0, 1):
        for update in (1, 2, 3):
            drawn.append(anchor_seeds(seed, update, list(range(20))).flatten())
            drawn.append(branch_seeds(seed, update, range(20), range(8), 12).flatten())
    drawn = torch.cat(drawn)
    assert len(drawn.unique()) == len(drawn)


def test_prompts_come_in_shuffled_epochs():
    sampler = PromptSampler([str(i) for i in range(10)], 4, run_seed=0)
    updates = [sampler.ids(u) for u in range(1, 101)]
    for ids in updates:
        assert len(ids) == len(set(ids)) == 4
    for first, second in zip(updates[::2], updates[1::2], strict=True):
        assert not set(first) & set(second)  # one epoch: two updates, two prompts left over
    assert len({tuple(ids) for ids in updates}) > 90
    counts = np.bincount(np.concatenate(updates), minlength=10)
    assert counts.min() >= 30  # of 40 on average: nobody is left out
    other = PromptSampler([str(i) for i in range(10)], 4, run_seed=1)
    assert [other.ids(u) for u in range(1, 6)] != updates[:5]


def test_prompt_files(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  two dogs \na cat\nüber\n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "two dogs", "über"]
    path.write_text("\n \n")
    with pytest.raises(ConfigurationError, match="holds no prompt"):
        read_prompts(path)
    path.write_bytes(b"\xef\xbb\xbfa cat\r\ntwo dogs\r\n")  # as an editor of Windows writes it
    assert read_prompts(path) == ["a cat", "two dogs"]
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigurationError, match=r"data\.prompts is '.*'; expected UTF-8 text"):
        read_prompts(path)
    with pytest.raises(ConfigurationError, match="is 3; expected 1 to 2, the number of prompts"):
        PromptSampler(["a", "b"], 3, 0)


def test_reward_import_errors():
    assert import_reward("tiny:brightness").__name__ == "brightness"
    for path, message in {
        "tiny": "expected 'package.module:function'",
        ":f": "expected 'package.module:function'",
        "tiny:": "expected 'package.module:function'",
        "no_such_module:f": "there is no 'no_such_module'",
        "torch.no_such:f": "there is no 'torch.no_such'",
        "tiny:PROMPTS": "found tuple",
        "tiny:absent": "found nothing",
    }.items():
        with pytest.raises(ConfigurationError, match=message):
            import_reward(path)


def test_reward_module_that_misses_another(tmp_path, monkeypatch):
    """The fault is inside the module: its own error is shown, not ours."""
    (tmp_path / "needs_more.py").write_text("import not_installed_here\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_here"):
        import_reward("needs_more:f")


def test_reward_names():
    paths = ["a.b:hps", "c:clip", "d:clip"]
    assert [reward_name(p, paths) for p in paths] == ["hps", "c.clip", "d.clip"]


def test_reward_contract():
    images, prompts = torch.rand(3, 1, 4, 4), ["a", "b", "c"]
    assert score(Reward("list", lambda i, p: [1, 2, 3]), images, prompts).tolist() == [1, 2, 3]
    wrong = Reward("wrong", lambda i, p: torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"'wrong' returned shape \(3, 1\); expected \(3,\)"):
        score(wrong, images, prompts)
    nothing = Reward("nothing", lambda i, p: None)
    with pytest.raises(TypeError, match=r"'nothing' returned a NoneType, .* shape \(3,\)"):
        score(nothing, images, prompts)
    grad = Reward("grad", lambda i, p: i.mean((1, 2, 3)))
    assert not score(grad, images.requires_grad_(), prompts).requires_grad


def test_advantages_are_arranged_for_the_loss():
    """[R, J, B * G, K] -> [B, K, G]: a row a prompt and position, a column a branch."""
    rewards = torch.rand(2, 3, 2 * 4, 5, generator=torch.Generator().manual_seed(0)).double()
    out = integrate_advantages(rewards, 4, [1.0, 0.25])
    assert out.values.shape == (2, 5, 4) and out.groups == 2 * 3 * 2 * 5
    for b, k in [(0, 0), (1, 3)]:
        expected = 0.0
        for r, weight in enumerate((1.0, 0.25)):
            for j in range(3):
                group = rewards[r, j, 4 * b : 4 * b + 4, k]
                expected = expected + weight * (group - group.mean()) / (group.std() + 1e-8)
        torch.testing.assert_close(out.values[b, k].double(), expected, atol=1e-6, rtol=1e-6)


def test_advantage_counts():
    rewards = torch.rand(2, 1, 8, 3, dtype=torch.float64)
    rewards[0, 0, :4, 1] = 0.1  # a group without spread
    rewards[0, 0, 5, 2] = torch.nan  # a failed group
    rewards[1] = torch.inf  # a model of weight 0 neither counts nor fails
    out = integrate_advantages(rewards, 4, [1.0, 0.0])
    assert (out.zero_spread_groups, out.failed_groups, out.groups) == (1, 1, 6)
    assert (out.values[0, 1] == 0).all() and (out.values[1, 2] == 0).all()
    assert (out.values[1, 1] != 0).any()
    with pytest.raises(TrainingError, match="all 6 groups"):
        integrate_advantages(torch.full_like(rewards, torch.nan), 4, [1.0, 0.0])


@pytest.mark.parametrize("keep_last, left", [(2, [3, 4]), (0, [1, 2, 3, 4])])
def test_checkpoints_kept(tmp_path, keep_last, left):
    weights = FullWeights(TinyModel().policy.transformer)
    for update in (1, 2, 3, 4):
        save_checkpoint(tmp_path, update, weights, None, {"updates": update}, keep_last)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-{u:06d}" for u in left]
    checkpoint = load_checkpoint(tmp_path, weights)
    assert checkpoint.update == checkpoint.state["updates"] == 4 and checkpoint.skipped == ()
    for name, tensor in weights.transformer.state_dict().items():
        assert torch.equal(checkpoint.weights[name], tensor)


def test_checkpoint_folder_that_is_not_there(tmp_path):
    weights = FullWeights(TinyModel().policy.transformer)
    assert load_checkpoint(tmp_path / "nowhere", weights) is None


def test_damaged_checkpoint_displaces_no_whole_one(tmp_path):
    """What a resume has passed over is not among the newest that are kept."""
    weights = FullWeights(TinyModel().policy.transformer)
    for update in (4, 6):
        save_checkpoint(tmp_path, update, weights, None, {}, keep_last=0)
    (tmp_path / "step-000006" / MANIFEST).write_text("{")
    save_checkpoint(tmp_path, 5, weights, None, {}, keep_last=1)
    checkpoint = load_checkpoint(tmp_path, weights)
    assert checkpoint.update == 5 and "step-000006" in checkpoint.skipped[0]
    assert not (tmp_path / "step-000004").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"bytes": []}', '{"bytes": {}}'])
def test_damaged_manifest(tmp_path, text):
    weights = FullWeights(TinyModel().policy.transformer)
    for update in (1, 2):
        save_checkpoint(tmp_path, update, weights, None, {}, keep_last=2)
    (tmp_path / "step-000002" / MANIFEST).write_text(text)
    assert load_checkpoint(tmp_path, weights).update == 1


def test_half_written_checkpoints_are_cleared_away(tmp_path):
    """Whatever update they are of: at FLUX's size each is tens of gigabytes."""
    (tmp_path / ".step-000003.partial" / "transformer").mkdir(parents=True)
    weights = FullWeights(TinyModel().policy.transformer)
    save_checkpoint(tmp_path, 4, weights, None, {}, keep_last=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]


def test_checkpoints_are_ordered_by_number(tmp_path):
    for update in (1_000_000, 999_999):
        (tmp_path / f"step-{update:06d}").mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_other_prompts_are_another_run():
    """A prompts file edited between start and resume would change every draw from there on."""

    def trainer(prompts):
        rewards = [Reward("brightness", brightness)]
        return Trainer(tiny_config(), TinyModel(prompts=prompts), rewards)

    first, other = trainer(["up", "down"]), trainer(["down", "up"])
    state, weights = first.state_dict(), first.policy.transformer.state_dict()
    trainer(["up", "down"]).load_state_dict(state, weights)
    with pytest.raises(ConfigurationError, match="data.prompts .* started with, in their order"):
        other.load_state_dict(state, weights)


def test_diversity():
    """A pixel's spread over one prompt's images; what differs between prompts does not count."""
    images = torch.zeros(5, 1, 2, 2)
    images[2:4] = 1.0  # prompt b: two alike
    images[1, 0, 0, 0] = 0.5  # prompt a: one pixel of four differs, 0 and 0.5
    one = torch.tensor([0.0, 0.5]).std().item() / 4
    assert diversity(images, ["a", "a", "b", "b", "c"]) == pytest.approx((one + 0.0) / 2)
    assert math.isnan(diversity(images[:2], ["a", "b"]))
