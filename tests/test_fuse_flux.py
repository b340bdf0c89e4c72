"""fuse_flux: diffusers' FLUX on the fused ops, against diffusers' own forward."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

import g2rpo_kernels as gk
from g2rpo_kernels import joint_linear as joint
from g2rpo_kernels.flux import blocks_of, is_fused

TINY = {
    "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2,
    "attention_head_dim": 16, "num_attention_heads": 4, "joint_attention_dim": 32,
    "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
# FLUX's own widths, cut to two blocks of each kind: 1.03 billion parameters.
TRUE = {
    **TINY, "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


def new_flux(architecture: dict = TINY, seed: int = 0) -> FluxTransformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(**architecture)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases begin at 0, which leaves the modulations off
                nn.init.normal_(parameter, mean=0.0, std=0.3)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        for name, parameter in block.attn.named_parameters():
            if "norm" in name:
                parameter.data += 1
    return model.eval()


def inputs(model: nn.Module, batch: int = 2, image: int = 16, text: int = 5) -> dict:
    config, generator = model.config, torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    side = int(image**0.5)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return {
        "hidden_states": draw(batch, image, config.in_channels),
        "encoder_hidden_states": draw(batch, text, config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": torch.linspace(0.3, 0.9, batch), "guidance": torch.full((batch,), 3.5),
        "img_ids": ids, "txt_ids": torch.zeros(text, 3), "return_dict": False,
    }  # fmt: skip


def run(model: nn.Module, given: dict, dtype: torch.dtype = torch.float32) -> Tensor:
    cast = ("hidden_states", "encoder_hidden_states", "pooled_projections")
    return model(**{k: v.to(dtype) if k in cast else v for k, v in given.items()})[0]


def run_and_gradients(
    model: nn.Module, given: dict, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter of a fixed random functional of it."""
    model.zero_grad()
    out = run(model, given, dtype)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out.float() * weights).sum().backward()
    found = {name: p.grad.float().clone() for name, p in model.named_parameters()}
    assert all(grad is not None for grad in found.values())
    return {"output": out.detach().float(), **found}


def error(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize("text", [5, 0])
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_is_diffusers(batch, text):
    model = new_flux()
    given = inputs(model, batch=batch, text=max(text, 1))
    true = run_and_gradients(model, given)
    found = run_and_gradients(gk.fuse_flux(model), given)
    for name in true:
        assert error(found[name], true[name]) <= 1e-5, name


def check_bfloat16(architecture: dict, **sizes: int) -> None:
    """Against float32, errors are at most 1.2 times those of diffusers' bfloat16; for gradients,
    in the norm over all of them and for each parameter up to the scatter of rounding."""
    model = new_flux(architecture)
    given = inputs(model, **sizes)
    true = run_and_gradients(model, given)
    nn.Module.to(model, torch.bfloat16)  # (diffusers' own warns of modules that are not there)
    theirs = run_and_gradients(model, given, torch.bfloat16)
    ours = run_and_gradients(gk.fuse_flux(model), given, torch.bfloat16)

    def total(found: dict[str, Tensor], names: list[str]) -> float:
        squares = sum((found[n] - true[n]).double().square().sum() for n in names)
        return (squares / sum(true[n].double().square().sum() for n in names)).sqrt().item()

    parameters = [name for name in true if name != "output"]
    for names in (["output"], parameters):
        ratio = total(ours, names) / total(theirs, names)
        print(f"{len(names)} tensors: error {total(ours, names):.3g}, {ratio:.3f} of diffusers'")
        assert ratio <= 1.2
    worst = max(error(ours[n], true[n]) / error(theirs[n], true[n]) for n in parameters)
    print(f"worst single gradient: {worst:.3f} of diffusers'")
    assert worst <= 1.5


def test_bfloat16_errs_no_more_than_diffusers():
    check_bfloat16(TINY, batch=2, image=64, text=8)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_true_widths_in_bfloat16():
    check_bfloat16(TRUE, batch=1, image=16, text=8)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_true_widths_in_float32():
    model = new_flux(TRUE)
    given = inputs(model, batch=1, image=16, text=8)
    true = run_and_gradients(model, given)
    found = run_and_gradients(gk.fuse_flux(model), given)
    for name in true:
        assert error(found[name], true[name]) <= 1e-5, name


def test_parameters_stay_and_unfusing_undoes(tmp_path):
    model = new_flux()
    given = inputs(model)
    before, parameters = run(model, given), dict(model.named_parameters())
    values = copy.deepcopy(model.state_dict())
    kinds = [type(block) for block in model.modules()]
    assert gk.fuse_flux(model) is model
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    state = model.state_dict()
    assert state.keys() == values.keys()
    assert all(torch.equal(state[name], values[name]) for name in values)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(saved[name], values[name]) for name in values)
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(again, given), before)
    assert gk.unfuse_flux(model) is model
    assert [type(block) for block in model.modules()] == kinds
    assert torch.equal(run(model, given), before)
    weights = [p for p in model.parameters()]
    assert len({p.untyped_storage().data_ptr() for p in weights}) == len(weights)
    gk.fuse_flux(model)


def test_one_matrix_without_a_copy(monkeypatch):
    model = gk.fuse_flux(new_flux())
    block = model.single_transformer_blocks[0]
    linears = [block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp]
    first = linears[0].weight
    assert len({linear.weight.untyped_storage().data_ptr() for linear in linears}) == 1
    given = inputs(model)
    whole = run_and_gradients(model, given)
    copies, concatenate = [], torch.cat

    def cat(parts, *arguments, **keywords):
        copies.append(parts)
        return concatenate(parts, *arguments, **keywords)

    monkeypatch.setattr(joint.torch, "cat", cat)
    run(model, given)
    assert not any(part is first for parts in copies for part in parts)
    nn.Module.to(nn.Module.to(model, torch.bfloat16), torch.float32)  # each a tensor of its own
    run(model, given)
    assert any(part is block.attn.to_q.weight for parts in copies for part in parts)
    monkeypatch.undo()
    model = gk.fuse_flux(new_flux())
    for each in [*model.transformer_blocks, *model.single_transformer_blocks]:
        for linear in each.modules():
            if isinstance(linear, nn.Linear):
                linear.weight.data = linear.weight.data.clone()
    apart = run_and_gradients(model, given)
    for name in whole:
        assert error(apart[name], whole[name]) <= 1e-6, name


def test_optimizer_steps_and_loaded_weights_are_seen():
    model, plain = gk.fuse_flux(new_flux()), new_flux()
    given = inputs(model)
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        run_and_gradients(each, given)
        optimizer.step()
    torch.testing.assert_close(run(model, given), run(plain, given), rtol=1e-4, atol=1e-5)
    other = new_flux(seed=5)
    model.load_state_dict(other.state_dict(), strict=True)
    torch.testing.assert_close(run(model, given), run(other, given), rtol=1e-4, atol=1e-5)
    model.load_state_dict(plain.state_dict(), strict=True, assign=True)
    torch.testing.assert_close(run(model, given), run(plain, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters(when):
    import peft

    def with_adapters(model):
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False,
            target_modules=["attn.to_q", "attn.to_v", "ff.net.2", "proj_mlp", "attn.add_k_proj"],
        )  # fmt: skip
        model.add_adapter(config)
        return model

    plain = with_adapters(new_flux())
    if when == "before":
        model = gk.fuse_flux(with_adapters(new_flux()))
    else:
        model = with_adapters(gk.fuse_flux(new_flux()))
    given = inputs(model)
    adapted = run(model, given)
    torch.testing.assert_close(adapted, run(plain, given), rtol=1e-4, atol=1e-5)
    (run(model, given).sum()).backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    model.disable_adapters()
    torch.testing.assert_close(run(model, given), run(new_flux(), given), rtol=1e-4, atol=1e-5)
    assert (adapted - run(model, given)).abs().max() > 1e-3


def test_gradient_checkpointing_changes_no_bit():
    model = gk.fuse_flux(new_flux())
    given = inputs(model)
    plain = run_and_gradients(model, given)
    model.enable_gradient_checkpointing()
    again = run_and_gradients(model, given)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_compiled_with_all_in_one_graph():
    model = gk.fuse_flux(new_flux())
    given = inputs(model)
    true = run_and_gradients(model, given)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = run_and_gradients(compiled, given)
    for name in true:
        twin = name if name == "output" else f"_orig_mod.{name}"
        assert error(found[twin], true[name]) <= 1e-5, name


def test_gradients_under_autocast():
    """Weights in float32, products in bfloat16: as near the float32 model as diffusers is."""
    model = new_flux()
    given = inputs(model)
    true = run_and_gradients(model, given)

    def autocast() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return run_and_gradients(model, given)

    theirs = autocast()
    gk.fuse_flux(model)
    ours = autocast()
    for name in true:
        assert error(ours[name], true[name]) <= 1.5 * error(theirs[name], true[name]), name


def test_a_copy_is_fused_too():
    model = gk.fuse_flux(new_flux())
    given = inputs(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, given), run(model, given))
    with torch.no_grad():
        twin.transformer_blocks[0].attn.to_q.weight.zero_()
    assert not torch.equal(run(twin, given), run(model, given))


def test_hooks_come_after_fusing():
    """accelerate's replace a block's forward, past which the fused one would never run."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    late = new_flux()
    add_hook_to_module(late.transformer_blocks[1], ModelHook())
    with pytest.raises(ValueError, match="forward is replaced, as hooks of accelerate"):
        gk.fuse_flux(late)
    model = gk.fuse_flux(new_flux())
    given = inputs(model)
    before = run(model, given)
    for block in blocks_of(model):
        add_hook_to_module(block, ModelHook())
    assert torch.equal(run(model, given), before)


def test_what_is_refused():
    with pytest.raises(TypeError, match="is a Linear; expected diffusers' FluxTransformer2DModel"):
        gk.fuse_flux(nn.Linear(2, 2))
    model = gk.fuse_flux(new_flux())
    with pytest.raises(ValueError, match="is fused already"):
        gk.fuse_flux(model)
    with pytest.raises(ValueError, match="is not fused"):
        gk.unfuse_flux(new_flux())
    odd = FluxTransformer2DModel(**{**TINY, "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8)})
    with pytest.raises(ValueError, match="heads of 24; expected a multiple of 16"):
        gk.fuse_flux(odd)
    changed = new_flux()
    block = changed.single_transformer_blocks[1]
    block.__class__ = type("MyBlock", (type(block),), {})
    with pytest.raises(ValueError, match="a block of class MyBlock; expected diffusers' own class"):
        gk.fuse_flux(changed)
    wrapped = new_flux()
    wrapped.transformer_blocks[0] = nn.Sequential(wrapped.transformer_blocks[0])
    with pytest.raises(ValueError, match="a block of class Sequential; .* not yet wrapped"):
        gk.fuse_flux(wrapped)
    assert not any(is_fused(block) for each in (changed, wrapped) for block in blocks_of(each))
    given = inputs(model)
    with pytest.raises(RuntimeError, match="joint_attention_kwargs has .'ip_hidden_states'."):
        model(**given, joint_attention_kwargs={"ip_hidden_states": []})

    class Other:
        _attention_backend = None

    plain = new_flux()
    plain.transformer_blocks[1].attn.processor = Other()
    with pytest.raises(ValueError, match="the attention processor Other"):
        gk.fuse_flux(plain)
    model.transformer_blocks[1].attn.processor = Other()
    with pytest.raises(ValueError, match="the attention processor Other"):
        run(model, given)
