"""FP8 completions: what they change, and what must never see them."""

import copy
import math

import pytest
import torch
from test_fuse_flux import TINY, error, inputs, new_flux, run
from tiny import TinyModel, brightness, contrast, tiny_config

import g2rpo.run  # noqa: F401  (or its first import would keep what a test below has patched)
import g2rpo_kernels as gk
from g2rpo.engine import fp8_rollout
from g2rpo.errors import ConfigurationError
from g2rpo.fp8_gate import lines, measure
from g2rpo.metrics import size
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer


def fp8_of(model) -> gk.Fp8Rollout:
    return gk.Fp8Rollout(gk.fuse_flux(model), emulate=True)


def plain_forward(model, given) -> torch.Tensor:
    with torch.no_grad():
        return run(model, given)


def test_within_and_after():
    """A few per cent of error within, and the bits of before after it; no memory but the copies."""
    model = new_flux()
    fp8 = fp8_of(model)
    given = inputs(model, image=64)
    before = plain_forward(model, given)
    with fp8:
        within = plain_forward(model, given)
        assert torch.equal(plain_forward(model, given), within)
    assert torch.equal(plain_forward(model, given), before)
    assert 1e-4 < error(within, before) < 0.1
    token_linears = [
        linear.weight
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]
        for name, linear in block.named_modules()
        if isinstance(linear, torch.nn.Linear) and "norm" not in name
    ]
    weights = sum(weight.numel() for weight in token_linears)
    rows = sum(len(weight) for weight in token_linears)
    assert fp8.nbytes == weights + 4 * rows
    assert not any("fp8" in name for name in model.state_dict())


def test_the_same_as_quantising_by_hand():
    """Each token linear sees values that e4m3 holds, on both sides, and nothing else is touched."""
    model = new_flux({**TINY, "num_layers": 1, "num_single_layers": 0})
    given = inputs(model)
    plain = copy.deepcopy(model)
    with fp8_of(model):
        ours = plain_forward(model, given)

    def rounded(x):
        values, scales = gk.quantize_fp8(x)
        return values.float() * scales[..., None]

    block = plain.transformer_blocks[0]
    for name, linear in block.named_modules():
        if isinstance(linear, torch.nn.Linear) and "norm" not in name:
            linear.weight.data = rounded(linear.weight.data)
            linear.register_forward_pre_hook(lambda module, given: (rounded(given[0]),))
    assert error(ours, plain_forward(plain, given)) < 1e-3
    assert error(ours, plain_forward(model, given)) > 1e-3


def test_refresh_follows_the_weights():
    model = new_flux()
    fp8 = fp8_of(model)
    given = inputs(model)
    with fp8:
        before = plain_forward(model, given)
    model.load_state_dict(new_flux(seed=4).state_dict())
    with fp8:
        stale = plain_forward(model, given)
    fp8.refresh()
    with fp8:
        after = plain_forward(model, given)
    with fp8_of(new_flux(seed=4)) as other:
        pass
    fresh = new_flux(seed=4)
    with fp8_of(fresh):
        assert torch.equal(plain_forward(fresh, given), after)
    assert other.nbytes == fp8.nbytes
    assert not torch.equal(before, after) and not torch.equal(stale, after)


def test_adapters_are_merged_into_the_copies():
    import peft

    model = new_flux()
    torch.manual_seed(3)
    model.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, target_modules=["attn.to_q", "proj_mlp"]
        )
    )
    fp8 = fp8_of(model)
    given = inputs(model, image=64)
    plain = plain_forward(model, given)
    with fp8:
        within = plain_forward(model, given)
    model.disable_adapters()
    without = plain_forward(model, given)
    fp8.refresh()
    with fp8:
        within_without = plain_forward(model, given)
    assert error(within, plain) < 0.1 < error(within, without)
    assert error(within_without, without) < 0.1


def test_what_is_refused():
    with pytest.raises(ValueError, match="is not fused"):
        gk.Fp8Rollout(new_flux(), emulate=True)
    with pytest.raises(RuntimeError, match="cpu cannot multiply FP8 .* emulate=True"):
        gk.Fp8Rollout(gk.fuse_flux(new_flux()))
    model = new_flux()
    fp8 = fp8_of(model)
    given = inputs(model)
    with fp8, pytest.raises(RuntimeError, match="gradients inside an Fp8Rollout"):
        run(model, given)
    with fp8, pytest.raises(RuntimeError, match="expected to enter once"):
        with fp8:
            pass
    assert run(model, given).requires_grad


def test_what_is_not_finite_shows():
    """One broken row of activations: its image is NaN, no other changes."""
    model = new_flux()
    given = inputs(model, batch=3)
    with fp8_of(model):
        before = plain_forward(model, given)
        given["hidden_states"][1, 4, 2] = torch.inf
        after = plain_forward(model, given)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


# In the trainer ---------------------------------------------------------------------------------


def make(precision="fp8", fuse=True, **train) -> Trainer:
    config = tiny_config()
    config.model.fuse, config.rollout.precision = fuse, precision
    config.optimizer.lr = 0.01
    for name, value in train.items():
        setattr(config.train, name, value)
    config.validate()
    return Trainer(config, TinyModel(), [Reward("brightness", brightness)])


def test_ratio_is_exactly_one_and_fp8_is_used():
    """The completions see FP8, which moves rewards; the anchors and the update do not."""
    fp8, plain = make(), make(precision=None)
    for _ in range(3):
        row = fp8.update()
        assert row["ratio_mean"] == row["ratio_max"] == 1.0 and row["grad_norm"] > 0
    first, second = make().update(), plain.update()
    assert first["rollout/brightness/mean"] != second["rollout/brightness/mean"]
    assert first["rollout/brightness/mean"] == pytest.approx(
        second["rollout/brightness/mean"], abs=0.01
    )
    unfused = make(precision=None, fuse=False).update()
    assert second["grad_norm"] == pytest.approx(unfused["grad_norm"], rel=1e-3)
    assert second["rollout/brightness/mean"] == pytest.approx(
        unfused["rollout/brightness/mean"], abs=1e-5
    )


def test_copies_are_of_the_weights_of_now_and_gone_when_completions_end():
    trainer = make()
    fp8, seen = trainer.sampling.engine.precision, []
    attention = trainer.policy.transformer.transformer_blocks[0].attn

    def look(self):
        """The copies as the completions begin, against the weights as they then are."""
        entered = type(fp8).__enter__(fp8)
        copies = fp8._copies[0][1]["qkv"]
        expected = gk.quantize_fp8(attention.to_q.weight.detach())
        seen.append(torch.equal(copies.parts[0].values.float(), expected.values.float()))
        return entered

    class Looking(type(fp8)):
        __enter__ = look

    trainer.sampling.engine.precision = copy.copy(fp8)
    trainer.sampling.engine.precision.__class__ = Looking
    assert fp8.nbytes == 0
    trainer.update()
    state, weights = copy.deepcopy(trainer.state_dict()), {
        name: p.detach().clone() for name, p in trainer.weights.parameters.items()
    }
    trainer.update()
    trainer.load_state_dict(state, weights)
    trainer.update()
    assert seen == [True] * 3 and fp8.nbytes == 0


def test_released_copies_are_made_anew_and_half_made_ones_are_not_used(monkeypatch):
    model = new_flux()
    fp8, given = fp8_of(model), inputs(model)
    size = fp8.nbytes
    with fp8:
        before = plain_forward(model, given)
    fp8.release()
    assert fp8.nbytes == 0
    with fp8:
        assert fp8.nbytes == size and torch.equal(plain_forward(model, given), before)

    def no_memory(weights, parts):
        raise torch.OutOfMemoryError("out of memory")

    fp8.release()
    with monkeypatch.context() as patch:
        patch.setattr("g2rpo_kernels.fp8_rollout.refresh_fp8", no_memory)
        with pytest.raises(torch.OutOfMemoryError), fp8:
            pass
    assert fp8.nbytes == 0
    with fp8:
        assert torch.equal(plain_forward(model, given), before)


def test_precision_without_fused_blocks_is_refused():
    with pytest.raises(ConfigurationError, match="rollout.precision is 'fp8'; expected null, or"):
        make(fuse=False)


def test_the_gate():
    config = tiny_config()
    config.model.fuse, config.rollout.precision = True, "fp8"
    config.optimizer.lr = 0.01
    rewards = [Reward("brightness", brightness), Reward("contrast", contrast)]
    trainer = Trainer(config, TinyModel(), rewards)
    found = measure(trainer, updates=2)
    assert found.exact and found.log_prob_difference == 0.0 and found.not_finite == 0
    assert [sigma for sigma, _ in found.velocity_error] == trainer.sigmas[:3].tolist()
    assert all(1e-4 < error < 0.1 for _, error in found.velocity_error)
    assert found.rank_correlation.keys() == {"brightness", "contrast"}
    assert all(0.5 < value <= 1 for value in found.rank_correlation.values())
    assert 0.7 < found.sign_agreement <= 1
    told = dict(lines(found, ["brightness", "contrast"]))
    assert told["log_prob, rollout to update"] == "exactly 0"
    assert trainer.updates == 2 and not math.isnan(trainer.update()["loss"])
    with pytest.raises(ConfigurationError, match="rollout.precision is None"):
        measure(make(precision=None))


def test_the_command_of_the_gate(tmp_path, monkeypatch, capsys):
    from g2rpo import cli, models

    monkeypatch.setattr(models, "load_model", lambda config, **_: TinyModel())
    path = tmp_path / "run.yaml"
    path.write_text(
        "rollout: {steps: 6, sde_positions: [0, 1], group_size: 4, branch_batch: 8}\n"
        "rewards: [{name: 'tiny:brightness'}]\n"
    )
    assert cli.main(["doctor", "--fp8", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "emulated, for want of hardware" in out and "over 3 updates" in out
    assert "rank agreement of brightness" in out and "rollout to update exactly 0" in out
    assert cli.main(["doctor", "--fp8", str(path), "--objective.stepping", "per_position"]) == 2


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_copies_that_do_not_fit_are_not_called_bad_hardware(monkeypatch, adapters):
    """The error says how many bytes they are; what the hardware lacks is another's."""
    import peft

    model = gk.fuse_flux(new_flux())
    if adapters:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=["attn.to_q", "proj_mlp"]))
    fp8 = gk.Fp8Rollout(model, emulate=True)
    copies = [copy.whole for _, of_block in fp8._copies for copy in of_block.values()]
    values = sum(whole.values.nbytes for whole in copies)

    def failing(error: Exception):
        def make(*arguments, **options):
            raise error

        return make

    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.60 GiB")
    monkeypatch.setattr(gk, "Fp8Rollout", failing(full))
    with pytest.raises(ConfigurationError) as raised:
        fp8_rollout(model, torch.device("cuda", 0))
    text = str(raised.value)
    assert f"copies of the weights need {size(values)} on cuda:0" in text
    assert "expected more free memory" in text and "Tried to allocate 8.60 GiB" in text
    assert "this hardware" not in text and raised.value.__cause__ is full
    monkeypatch.setattr(gk, "Fp8Rollout", failing(RuntimeError("no FP8 before 8.9")))
    with pytest.raises(ConfigurationError, match="null on this hardware: no FP8 before 8.9"):
        fp8_rollout(model, torch.device("cuda", 0))
