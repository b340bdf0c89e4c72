"""What is trained: everything or adapters; the average, the starting policy, the files."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from tiny import TinyModel, brightness, tiny_config

from g2rpo.config import LoraConfig
from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer
from g2rpo.weights import FullWeights, LoraWeights, MovingAverage, assign

REWARDS = [Reward("brightness", brightness)]


def lora_config(rank=4, **changes):
    config = tiny_config()
    config.model.lora = LoraConfig(rank=rank, alpha=8.0)
    config.optimizer.lr = 0.01
    for name, value in changes.items():
        group, _, key = name.partition("__")
        setattr(getattr(config, group), key, value)
    return config


def make(config, **model) -> Trainer:
    return Trainer(config, TinyModel(**model), REWARDS)


def velocity(transformer) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    latents, text = torch.randn(2, 16, 4, generator=generator), torch.randn(2, 1, 32)
    with torch.no_grad():
        return transformer(
            hidden_states=latents.to(transformer.dtype), timestep=torch.tensor([0.3, 0.9]),
            encoder_hidden_states=torch.ones_like(text).to(transformer.dtype),
            pooled_projections=torch.ones(2, 32).to(transformer.dtype),
            txt_ids=torch.zeros(1, 3), img_ids=torch.zeros(16, 3), return_dict=False,
        )[0]  # fmt: skip


def test_adapters_are_all_that_moves():
    trainer = make(lora_config())
    before = {n: p.clone() for n, p in trainer.policy.transformer.named_parameters()}
    row = trainer.update()
    assert row["ratio_mean"] == row["ratio_max"] == 1.0
    moved = {n for n, p in trainer.policy.transformer.named_parameters()
             if not torch.equal(p, before[n])}  # fmt: skip
    assert moved and moved <= set(trainer.weights.parameters)
    assert all("lora_" in name for name in trainer.weights.parameters)
    # two factors each: 12 linears of the double block, the attention's 3 of the single one
    assert len(trainer.weights.parameters) == 2 * (12 + 3)
    assert len(trainer.improver.optimizer.state) == len(trainer.weights.parameters)


def test_adapters_begin_as_the_transformer_itself_and_alike():
    plain = TinyModel().policy.transformer
    first, second = TinyModel().policy.transformer, TinyModel().policy.transformer
    torch.manual_seed(1)
    a = LoraWeights(first, LoraConfig(rank=4), seed=5)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    b = LoraWeights(second, LoraConfig(rank=4), seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(velocity(first), velocity(plain))
    for name in a.parameters:
        assert torch.equal(a.parameters[name], b.parameters[name])
    assert not torch.equal(
        next(iter(LoraWeights(TinyModel().policy.transformer, LoraConfig(rank=4), 6)
                  .parameters.values())),
        next(iter(a.parameters.values())),
    )  # fmt: skip


def test_adapters_of_a_bfloat16_transformer_are_float32():
    transformer = TinyModel().policy.transformer.to(torch.bfloat16)
    weights = LoraWeights(transformer, LoraConfig(rank=2))
    assert {p.dtype for p in weights.parameters.values()} == {torch.float32}
    assert transformer.x_embedder.weight.dtype == torch.bfloat16
    assert velocity(transformer).dtype == torch.bfloat16


def test_adapters_load_as_pipelines_do(tmp_path):
    """Into a fresh transformer, by diffusers' own loader: the same velocity, alpha included."""
    trainer = make(lora_config())
    trainer.update()
    trainer.weights.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = TinyModel().policy.transformer
    plain = velocity(fresh)
    fresh.load_lora_adapter(
        tmp_path, prefix="transformer", weight_name="pytorch_lora_weights.safetensors",
        use_safetensors=True,
    )  # fmt: skip
    expected = velocity(trainer.policy.transformer)
    torch.testing.assert_close(velocity(fresh), expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 1e-4
    again = trainer.weights.read(tmp_path)
    for name, parameter in trainer.weights.parameters.items():
        assert torch.equal(again[name], parameter)


def test_other_adapters_are_refused(tmp_path):
    LoraWeights(TinyModel().policy.transformer, LoraConfig(rank=4)).save(tmp_path)
    other = LoraWeights(TinyModel().policy.transformer, LoraConfig(rank=4, targets=["attn.to_q"]))
    with pytest.raises(ConfigurationError, match="30 adapters' weights; expected the"):
        other.read(tmp_path)
    rank = LoraWeights(TinyModel().policy.transformer, LoraConfig(rank=2))
    with pytest.raises(ConfigurationError, match=r"has shape \(4, 64\); expected \(2, 64\)"):
        assign(rank.parameters, rank.read(tmp_path))


@pytest.mark.parametrize("rank", [0, 4])
def test_state_goes_on_bit_for_bit(tmp_path, rank):
    """Through the files, with adapters or without, an average and a KL term."""
    config = lora_config(rank, train__ema=0.5, objective__kl=0.1)
    straight, first = make(config), make(config)
    rows = [straight.update() for _ in range(3)]
    first.update()
    state = copy.deepcopy(first.state_dict())
    (tmp_path / "ema").mkdir()
    first.weights.save(tmp_path)
    first.weights.save(tmp_path / "ema", first.average.values)
    second = make(config)
    second.load_state_dict(
        state, second.weights.read(tmp_path), second.weights.read(tmp_path / "ema")
    )
    resumed = [second.update() for _ in range(2)]
    for name, parameter in straight.weights.parameters.items():
        assert torch.equal(parameter, second.weights.parameters[name])
        assert torch.equal(straight.average.values[name], second.average.values[name])
    for a, b in zip(rows[1:], resumed, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k and "memory" not in k} == {
            k: v for k, v in b.items() if "second" not in k and "memory" not in k
        }


@pytest.mark.parametrize("rank", [0, 4])
def test_kl_is_to_the_starting_policy(rank):
    """Zero at first, then that of the two velocities; the weights come back as they were."""
    trainer = make(lora_config(rank, objective__kl=0.1))
    start = velocity(trainer.policy.transformer)
    assert trainer.update()["kl"] == 0.0
    assert trainer.update()["kl"] > 0
    now = velocity(trainer.policy.transformer)
    with trainer.weights.starting_policy():
        assert torch.equal(velocity(trainer.policy.transformer), start)
    assert torch.equal(velocity(trainer.policy.transformer), now)
    assert not torch.equal(now, start)


def test_kl_holds_the_policy_back():
    """Its gradient counts: the same updates end nearer to where they began."""
    def kl_after_updates(weight):
        trainer = make(lora_config(0, objective__kl=weight))
        return [trainer.update()["kl"] for _ in range(6)][-1]

    assert kl_after_updates(1e4) < 0.5 * kl_after_updates(1e-9)
    assert "kl" not in make(lora_config(0)).update()


def test_kl_counts_its_evaluations():
    with_kl, without = make(lora_config(0, objective__kl=0.1)), make(lora_config(0))
    forwards = []
    with_kl.policy.transformer.register_forward_hook(
        lambda module, given, keywords, out: forwards.append(len(out[0])), with_kwargs=True
    )
    with_kl.update()
    padding = with_kl.sampling.plan(with_kl.sampling.positions(1)).padding
    assert sum(forwards) - padding == with_kl.evaluations_per_update
    assert with_kl.evaluations_per_update - without.evaluations_per_update == 2 * 3


@pytest.mark.parametrize("rank", [0, 4])
def test_gradient_checkpointing_changes_no_bit(rank):
    plain = make(lora_config(rank))
    config = lora_config(rank, model__gradient_checkpointing=True)
    again = make(config)
    kinds = []
    again.policy.transformer.transformer_blocks[0].register_forward_hook(
        lambda *_: kinds.append(torch.is_grad_enabled())
    )
    rows = plain.update(), again.update()
    assert rows[0]["grad_norm"] == rows[1]["grad_norm"] > 0 and rows[1]["ratio_max"] == 1.0
    for name, parameter in plain.weights.parameters.items():
        assert torch.equal(parameter, again.weights.parameters[name])
    assert kinds.count(True) >= 3  # the forwards that were made once more, in the backward


def test_average_is_the_formula_and_evaluated(tmp_path):
    config = lora_config(0, train__ema=0.75)
    trainer = make(config)
    name = "x_embedder.weight"
    expected = trainer.weights.parameters[name].detach().clone()
    for _ in range(3):
        trainer.update()
        expected = 0.75 * expected + 0.25 * trainer.weights.parameters[name].detach()
    torch.testing.assert_close(trainer.average.values[name], expected, rtol=1e-6, atol=1e-7)
    now = velocity(trainer.policy.transformer)
    averaged = trainer.evaluate()[0]["reward/brightness/mean"]
    assert torch.equal(velocity(trainer.policy.transformer), now)
    trainer.weights.save(tmp_path, trainer.average.values)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    model = TinyModel()
    model.policy.transformer.load_state_dict(
        load_file(tmp_path / "diffusion_pytorch_model.safetensors"), strict=True
    )
    alone = Trainer(lora_config(0), model, REWARDS)
    assert alone.evaluate()[0]["reward/brightness/mean"] == averaged
    FluxTransformer2DModel.from_pretrained(tmp_path)
    trainer.average = None
    assert trainer.evaluate()[0]["reward/brightness/mean"] != averaged


def test_average_of_bfloat16_is_float32():
    """A small step survives that bfloat16 would have rounded away."""
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    average = MovingAverage({"w": parameter}, decay=0.999)
    with torch.no_grad():
        parameter += 0.0078125
    average.update()
    assert average.values["w"].dtype == torch.float32
    assert (average.values["w"] == 1 + 0.0078125 * 0.001).all() or torch.allclose(
        average.values["w"], torch.tensor(1 + 0.0078125 * 0.001), rtol=1e-7
    )
    assert (average.values["w"] > 1).all()


def test_starting_weights_that_were_not_kept():
    weights = FullWeights(TinyModel().policy.transformer)
    with pytest.raises(RuntimeError, match="keep_start=True"), weights.starting_policy():
        pass
