"""The optimizers a configuration can name: made, stepped by the trainer, saved and gone on with."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from tiny import TinyModel, brightness, tiny_config

import g2rpo_kernels as gk
from g2rpo import run
from g2rpo.checkpoint import load_checkpoint, save_checkpoint
from g2rpo.config import LoraConfig, OptimizerConfig
from g2rpo.errors import ConfigurationError
from g2rpo.optimizers import make_optimizer, modulation_linears
from g2rpo.rewards import Reward
from g2rpo.streamed_adamw import StreamedAdamW
from g2rpo.trainer import Trainer

REWARDS = [Reward("brightness", brightness)]
PACKAGES = {"bitsandbytes": "bitsandbytes.optim", "torchao": "torchao.optim"}
NAMES = ["adamw", "adamw8bit", "adamw_streamed", *PACKAGES]


def need(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason=f"{name} is not installed")


def small_config(name="adamw8bit", **optimizer):
    config = tiny_config(steps=4, sde_positions=[0, 1], group_size=2)
    config.optimizer = replace(config.optimizer, name=name, **optimizer)
    config.validate()
    return config


def model_of(dtype) -> TinyModel:
    model = TinyModel()
    for parameter in model.policy.transformer.parameters():
        parameter.data = parameter.data.to(dtype)
    model.policy.dtype = dtype
    return model


def make(config, dtype=torch.bfloat16, fuse=False, **callbacks) -> Trainer:
    config.model.fuse = fuse
    return Trainer(config, model_of(dtype), REWARDS, **callbacks)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(trainer.policy.transformer.state_dict())


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# Made -------------------------------------------------------------------------------------------


def one(dtype=torch.bfloat16) -> dict[str, torch.nn.Parameter]:
    return {"layer.weight": torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))}


@pytest.mark.parametrize("name", NAMES)
def test_each_is_what_it_says(name):
    need(name)
    config = OptimizerConfig(name=name, lr=3e-4, betas=[0.8, 0.9], eps=1e-7, weight_decay=0.2)
    optimizer = make_optimizer(config, one(), seed=7)
    kinds = {"adamw": torch.optim.AdamW, "adamw8bit": gk.AdamW8bit, "adamw_streamed": StreamedAdamW}
    if name in kinds:
        assert type(optimizer) is kinds[name]
    else:
        assert isinstance(optimizer, sys.modules[PACKAGES[name]].AdamW8bit)
    (group,) = optimizer.param_groups
    assert float(group["lr"]) == pytest.approx(3e-4) and tuple(group["betas"]) == (0.8, 0.9)
    assert group["eps"] == 1e-7 and group["weight_decay"] == 0.2
    if name == "adamw8bit":
        assert group["master_bits"] == 24 and group["codec"] == "dynamic" and group["seed"] == 7
        other = replace(config, master_bits=32, codec="fp8")
        (group,) = make_optimizer(other, one(), seed=7).param_groups
        assert group["master_bits"] == 32 and group["codec"] == "fp8"


@pytest.mark.parametrize("name, extra", [("bitsandbytes", "bnb"), ("torchao", "torchao")])
def test_a_missing_package_is_named(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, f"{name}.optim", None)
    with pytest.raises(ConfigurationError) as caught:
        make_optimizer(OptimizerConfig(name=name), one(), seed=0)
    assert str(caught.value).startswith(f"optimizer.name is '{name}', which cannot be imported")
    assert f"pip install 'g2rpo[{extra}]'" in str(caught.value)


@pytest.mark.parametrize("name", NAMES[1:])
def test_parameters_of_another_dtype_are_named(name):
    with pytest.raises(ConfigurationError, match="layer.weight torch.float16; expected bfloat16 "):
        make_optimizer(OptimizerConfig(name=name), one(torch.float16), seed=0)
    make_optimizer(OptimizerConfig(name="adamw"), one(torch.float16), seed=0)


def test_wrong_names_and_numbers():
    with pytest.raises(ConfigurationError, match="optimizer.name is 'sgd'; expected 'adamw', "):
        make_optimizer(OptimizerConfig(name="sgd"), one(), seed=0)
    with pytest.raises(ConfigurationError, match="name is 'adamw8bit', and eps is 1e-40; expected"):
        make_optimizer(OptimizerConfig(name="adamw8bit", eps=1e-40), one(), seed=0)


@pytest.mark.parametrize(
    "key, value", [("master_bits", 16), ("master_bits", 32), ("codec", "fp8"), ("offload", True)]
)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw8bit"])
def test_keys_that_the_others_do_not_obey(name, key, value):
    with pytest.raises(ConfigurationError, match=f"optimizer.{key} is .*'adamw8bit' with it"):
        OptimizerConfig(name=name, **{key: value}).validate()
    OptimizerConfig(name="adamw8bit", **{key: value}).validate()


# Stepped by the trainer -------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw_streamed"])
def test_modulations_are_factored_where_factors_are_known(name, rank):
    config = small_config(name)
    config.model.lora = LoraConfig(rank=rank)
    trainer = make(config, torch.float32)
    kinds = {type(linear).__name__ for linear in modulation_linears(trainer.policy.transformer)}
    assert kinds == {"FactoredLinear" if name == "adamw8bit" and rank == 0 else "Linear"}


@pytest.mark.parametrize("fuse", [False, True])
def test_factored_gradients_change_nothing(fuse):
    """adamw8bit's updates are those it makes of dense gradients, up to rounding of the sums."""
    factored, dense = (make(small_config(master_bits=32), torch.float32, fuse) for _ in range(2))
    gk.unfactor_gradients(modulation_linears(dense.policy.transformer))
    kept = []
    step = factored.improver.optimizer.step

    def spy(**given):
        kept.extend(n for n, p in factored.weights.parameters.items() if hasattr(p, "grad_factors"))
        return step(**given)

    factored.improver.optimizer.step = spy
    start = weights(factored)
    norms = [[t.update()["grad_norm"] for _ in range(2)] for t in (factored, dense)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert len(set(kept)) == 4 and all("norm" in n and "weight" in n for n in kept)
    a, b = weights(factored), weights(dense)
    moved = torch.cat([(a[n] - start[n]).flatten() for n in a])
    apart = torch.cat([(a[n] - b[n]).flatten() for n in a])
    assert apart.norm() < 0.02 * moved.norm() and moved.norm() > 0


def test_clipping_is_a_scale_of_the_step():
    """The same coefficient that clips the others' gradients, which it leaves as they are."""
    config = small_config(max_grad_norm=1e-3)
    trainer = make(config, torch.float32)
    optimizer, scales = trainer.improver.optimizer, []
    step = optimizer.step

    def spy(*, grad_scale):
        norm = float(gk.total_grad_norm(trainer.improver.parameters))
        scales.append((grad_scale, norm))
        return step(grad_scale=grad_scale)

    optimizer.step = spy
    row = trainer.update()
    ((scale, norm),) = scales
    assert row["grad_norm"] == norm > 1e-3 and scale == pytest.approx(1e-3 / (norm + 1e-6))
    config.optimizer.max_grad_norm = 1e9
    trainer = make(config, torch.float32)
    trainer.improver.optimizer.step = lambda *, grad_scale: scales.append((grad_scale, 0))
    trainer.update()
    assert scales[-1][0] == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_updates_move_bfloat16_and_leave_no_gradient(name):
    """Before a rollout begins no gradient is there, nor factors of one."""
    need(name)
    trainer = make(small_config(name))
    seen, roll_out = [], trainer.roll_out

    def spy(*given):
        seen.extend(
            n for n, p in trainer.weights.parameters.items()
            if p.grad is not None or hasattr(p, "grad_factors")
        )  # fmt: skip
        return roll_out(*given)

    trainer.roll_out = spy
    for _ in range(2):
        before, row = weights(trainer), trainer.update()
        assert row["ratio_mean"] == row["ratio_max"] == 1.0
        assert row["grad_norm"] > 0 and not same(before, weights(trainer))
        assert all(w.dtype == torch.bfloat16 for w in before.values())
    assert seen == []


@pytest.mark.parametrize("stepping", ["accumulate", "per_position"])
def test_eight_bits_go_where_float32_goes(stepping):
    ends = {}
    for name in ("adamw", "adamw8bit"):
        config = small_config(name)
        config.objective.stepping = stepping
        trainer = make(config, torch.float32)
        start = weights(trainer)
        for _ in range(3):
            trainer.update()
        end = weights(trainer)
        ends[name] = torch.cat([(end[n] - start[n]).flatten() for n in end])
    cosine = torch.nn.functional.cosine_similarity(*ends.values(), dim=0)
    assert cosine > 0.98
    assert 0.9 < ends["adamw8bit"].norm() / ends["adamw"].norm() < 1.1


def test_gradient_that_is_not_finite_is_named():
    messages: list[str] = []
    trainer = make(small_config(offload=True), on_message=messages.append)
    trainer.update()
    optimizer = trainer.improver.optimizer
    before, state = weights(trainer), copy.deepcopy(optimizer.state_dict())
    handles = [
        p.register_hook(lambda grad: grad * torch.inf)
        for n, p in trainer.weights.parameters.items()
        if n in ("proj_out.bias", "x_embedder.weight", "norm_out.linear.bias")
    ]
    row = trainer.update()
    assert row["skipped_updates"] == 1 and same(before, weights(trainer))
    assert optimizer.skipped_steps == 1
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(torch.as_tensor(after[i][k]), torch.as_tensor(s[k]))
               for i, s in state["state"].items() for k in s if k != "dtype")  # fmt: skip
    assert len(messages) == 1 and messages[0].startswith(
        "Update 2 is skipped: the gradient of x_embedder.weight, and 2 more is not finite (prompt '"
    )
    for handle in handles:
        handle.remove()
    assert all(p.grad is None for p in trainer.improver.parameters)
    trainer.update()
    assert trainer.skipped_in_a_row == 0 and not same(before, weights(trainer))


def test_states_leave_for_rollouts_and_evaluations():
    """Away while completions and evaluations are made, back for the step, nothing else changed."""
    plain = make(small_config())
    phases: list[str] = []
    trainer = make(small_config(offload=True), on_phase=phases.append)
    optimizer, away = trainer.improver.optimizer, []

    def spy(name, call):
        return lambda **given: (away.append(name), call(**given))[1]

    for name in ("offload", "restore", "step"):
        setattr(optimizer, name, spy(name, getattr(optimizer, name)))
    trainer.policy.transformer.register_forward_pre_hook(
        lambda *_: away.append("with" if torch.is_grad_enabled() else "without")
    )
    rows = []
    for t in (plain, trainer):
        rows.append([t.update(), t.evaluate()[0], t.update()])
    order = [name for name, before in zip(away, [None, *away]) if name != before]
    update = ["offload", "without", "with", "restore", "step"]
    assert order == [*update, "offload", "without", *update]
    assert same(weights(plain), weights(trainer))
    assert "offload" in phases and rows[1][0]["seconds/offload"] >= 0
    assert not any("offload" in key for key in rows[0][0])


# Gone on with -----------------------------------------------------------------------------------

RESUMED = [
    ("adamw", {}), ("adamw8bit", {}), ("adamw8bit", {"master_bits": 16}),
    ("adamw8bit", {"master_bits": 32, "codec": "fp8", "offload": True}), ("adamw_streamed", {}),
    ("bitsandbytes", {}), ("torchao", {}),
]  # fmt: skip


@pytest.mark.parametrize("name, given", RESUMED)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, name, given):
    """Through the files of a checkpoint: codes of 8 bits, extra bits and masters included."""
    need(name)
    straight, first, second = (make(small_config(name, **given)) for _ in range(3))
    for _ in range(3):
        straight.update()
    first.update()
    first.evaluate()
    save_checkpoint(tmp_path, 1, first.weights, None, first.state_dict(), keep_last=1)
    torch.randn(5)  # the global generator plays no part
    checkpoint = load_checkpoint(tmp_path, second.weights, second.improver.optimizer)
    assert not checkpoint.skipped
    second.load_state_dict(checkpoint.state, checkpoint.weights)
    for _ in range(2):
        second.update()
    assert same(weights(straight), weights(second))
    a, b = (t.improver.optimizer.state_dict()["state"] for t in (straight, second))
    assert a.keys() == b.keys() and len(a) == len(straight.improver.parameters)
    for index, state in a.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and not hasattr(value, "codes"):
                assert value.dtype == b[index][key].dtype, key
                assert torch.equal(value, b[index][key]), key


def test_states_of_another_kind_are_refused():
    trainer, other = make(small_config()), make(small_config(master_bits=32))
    trainer.update()
    with pytest.raises(ValueError, match="has master_bits 24, this optimizer 32"):
        other.load_state_dict(trainer.state_dict(), trainer.weights.parameters)


# Told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw_streamed"])
def test_weights_that_round_steps_away_are_warned_of(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(run, "load_model", lambda config, **_: model_of(torch.bfloat16))
    config = small_config(name)
    config.train.updates = 1
    assert run.start(config, tmp_path / "run") == 0
    out = " ".join(capsys.readouterr().out.split())
    warned = "optimizer.name is adamw: of a step, what is smaller than 1/512" in out
    assert warned == (name == "adamw")
    assert ("optimizer.name adamw8bit, model.dtype float32 or" in out) == warned
