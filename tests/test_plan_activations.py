"""The plan's activations, states and buffers against what real, small work on a CPU holds."""

import gc

import pytest
import torch
from live_memory import Live
from test_fuse_flux import TINY, inputs, new_flux
from tiny import TinyModel, brightness, tiny_config
from torch import nn

import g2rpo_kernels as gk
from g2rpo.config import LORA_TARGETS, LoraConfig
from g2rpo.optimizers import make_optimizer, modulation_linears
from g2rpo.plan.activations import Activations
from g2rpo.plan.memory import plan_memory, trained
from g2rpo.plan.model import FLUX_VAE, transformer_sizes
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer
from g2rpo.weights import LoraWeights

# Wide enough that activations are more than what belongs to a row or a head.
ARCHITECTURE = {
    **TINY, "attention_head_dim": 32, "joint_attention_dim": 64, "pooled_projection_dim": 48,
    "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
SIZES = {  # blocks of each kind, tokens of image and text, rows
    "two rows": ({"num_layers": 1, "num_single_layers": 2}, 256, 40, 2),
    "three rows": ({"num_layers": 2, "num_single_layers": 1}, 100, 60, 3),
}
BOTH = pytest.mark.parametrize("size", SIZES)


def close(estimate: float, counted: float, within: float = 0.05) -> bool:
    print(f"estimate {estimate:,.0f}, counted {counted:,.0f}: {estimate / counted - 1:+.2%}")
    return abs(estimate / counted - 1) <= within


def setting(size, dtype, fused, checkpointing, lora=False):
    """A transformer, its inputs, and the plan of both."""
    blocks, image, text, rows = SIZES[size]
    model = new_flux({**ARCHITECTURE, **blocks})
    nn.Module.to(model, dtype)
    sizes = transformer_sizes(model, "test", image, text)
    if fused:
        gk.fuse_flux(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.requires_grad_(True)
    if lora:
        LoraWeights(model, LoraConfig(rank=4))
    given = inputs(model, batch=rows, image=image, text=text)
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections"):
        given[name] = given[name].to(dtype)
    targets = LORA_TARGETS if lora else None
    plan = Activations(
        sizes, rows, dtype.itemsize, fused, checkpointing, targets, 4 if lora else 0, gpu=False
    )
    return model, given, plan


def saved_bytes(model, given) -> int:
    """What autograd saves in a forward: storages that are no parameter's, each counted once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**given)[0]
    assert out.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@BOTH
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "diffusers"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all"])
@pytest.mark.parametrize("trained", ["bfloat16", "float32", "adapters"])
def test_saved_and_peak(size, trained, fused, checkpointing):
    """What a forward keeps, and the peak of forward and backward, are within 5 %."""
    dtype = torch.float32 if trained == "float32" else torch.bfloat16
    model, given, plan = setting(size, dtype, fused, checkpointing, trained == "adapters")
    assert close(plan.saved(), saved_bytes(model, given))
    for parameter in model.parameters():  # so that those made below are on their way
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Live() as live:
        model(**given)[0].float().sum().backward()
    assert close(plan.backward(), live.peak)


@BOTH
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_peak_without_gradients(size, dtype, fused):
    model, given, plan = setting(size, dtype, fused, False)
    with torch.no_grad(), Live() as live:
        model(**given)
    assert close(plan.forward(), live.peak)
    if fused:
        rollout = gk.FluxRollout(model, given["img_ids"], 3.5)
        sigmas, index = torch.linspace(0.1, 1, 5), torch.arange(plan.rows)
        known = given["encoder_hidden_states"], given["pooled_projections"]
        with rollout.of(sigmas, *known), Live() as live:
            rollout(given["hidden_states"], index, index)
        assert close(plan.forward(rollout=True), live.peak)


def test_decoding_holds_three_maps_of_twice_the_channels():
    from diffusers import AutoencoderKL
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        vae = AutoencoderKL.from_config(FLUX_VAE).eval()
        latents = torch.empty(2, 16, 32, 32)
        with torch.no_grad(), Live() as live:
            vae.decode(latents)
    assert close(6 * 2 * 256**2 * 128 * 4, live.peak, within=0.001)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_states_of_real_optimizers(name, dtype):
    config = tiny_config()
    config.model.dtype, config.optimizer.name = dtype, name
    config.model.path = "black-forest-labs/FLUX.1-dev"  # of which alone dtype may be null
    model = nn.Module.to(new_flux(ARCHITECTURE), getattr(torch, dtype))
    plan = trained(config, transformer_sizes(model, "test", 16, 8))
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(config.optimizer, parameters, seed=0)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        (key, value)
        for state in optimizer.state.values() for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim
    ]  # fmt: skip
    low = sum(value.nbytes for key, value in states if key == "low_bits")
    others = sum(value.nbytes for key, value in states if key != "low_bits")
    assert plan.low_bits == low and (low > 0) == (name == "adamw8bit" and dtype == "bfloat16")
    assert close(plan.moments, others, within=0.01)
    assert plan.weights == sum(parameter.nbytes for parameter in parameters.values())


def test_factors_adapters_and_copies_are_counted():
    model = new_flux(ARCHITECTURE)
    sizes = transformer_sizes(model, "test", 16, 5)
    linears = modulation_linears(model)
    config = tiny_config()
    config.optimizer.name, config.train.prompts_per_update = "adamw8bit", 2
    config.rollout.sde_positions = [0, 1]
    gk.factor_gradients(linears)
    given = inputs(model, batch=4)
    model(**given)[0].sum().backward()  # 4 rows, as 2 prompts at 2 positions
    plan = trained(config, sizes)
    assert plan.factors == sum(4 * linear.weight.grad_factors.numel for linear in linears)
    assert plan.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    gk.unfactor_gradients(linears)
    assert sizes.fp8_bytes == gk.Fp8Rollout(gk.fuse_flux(model), emulate=True).nbytes
    adapters = LoraWeights(new_flux(ARCHITECTURE), LoraConfig(rank=4)).parameters
    assert sizes.adapters(4, LORA_TARGETS) == sum(p.numel() for p in adapters.values())


def fp8_tensors() -> list[torch.Tensor]:
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return [t for t in tensors if t.dtype is torch.float8_e4m3fn]


@pytest.fixture(scope="module")
def an_update():
    """Peaks of a second update by the trainer's phases, FP8 bytes as its last phase began, and the
    plan of it."""
    config = tiny_config(steps=4, sde_positions=[0, 1], group_size=8, branch_batch=16)
    config.model.fuse = config.model.gradient_checkpointing = True
    config.rollout.precision = "fp8"
    config.train.prompts_per_update = 4
    peaks, fp8, live, running = {}, {}, Live(), []
    others = fp8_tensors()  # of tests before this one, alive until its end

    def begin(name):
        if running:
            peaks[running.pop()] = live.peak
        running.append(name)
        live.peak = live.now
        tensors = [t for t in fp8_tensors() if not any(t is other for other in others)]
        fp8[name] = sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    trainer = Trainer(config, TinyModel(), [Reward("brightness", brightness)], on_phase=begin)
    trainer.update()
    running.clear()
    with live:
        trainer.update()
        begin("")
    sizes = transformer_sizes(trainer.policy.transformer, "test", 16, 1)
    return peaks, fp8, plan_memory(config, sizes)


def made_in_it(memory, phase: str) -> int:
    """What the plan has in a phase, but for what is there from one update to the next."""
    lasting = {"weights", "optimizer's moments", "workspaces", "FP8 weights"}
    return sum(row.bytes.get(phase, 0) for row in memory.rows if row.name not in lasting)


def test_phases_of_a_whole_update(an_update):
    peaks, _, memory = an_update
    assert close(made_in_it(memory, "anchor"), peaks["anchor"])
    images = 3 * 16 * 64 * 4  # what the tiny model's decode makes of a batch
    assert close(made_in_it(memory, "rewards") + images, peaks["rewards"])


def test_the_update_is_without_the_rollouts_memory(an_update):
    peaks, fp8, memory = an_update
    assert close(made_in_it(memory, "backward"), peaks["update"])
    assert fp8["update"] == 0
