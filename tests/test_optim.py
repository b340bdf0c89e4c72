"""AdamW8bit's step: what it computes and what it skips."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Target, generator, targets
from torch import Tensor, nn

import g2rpo_kernels as gk
from g2rpo_kernels.optim import native as native_optim
from g2rpo_kernels.optim.arithmetic import join_master, seed_word
from g2rpo_kernels.optim.pack import seed_words

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = {"weight": (24, 33), "bias": (24,), "scalar": (), "empty": (0, 5), "conv": (6, 4, 3, 3)}
NATIVE = [t for t in targets() if t.backend in native_optim.EXTENSIONS]
needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype"
)


def parameters(
    dtype: torch.dtype = BF16, shapes: dict = SHAPES, device: str = "cpu"
) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter((torch.randn(shape, generator=generator(name)) * 0.02).to(device, dtype))
        for name, shape in shapes.items()
    }


def give_gradients(given: dict[str, nn.Parameter], step: int = 0, size: float = 1e-3) -> None:
    for name, p in given.items():
        grad = torch.randn(p.shape, generator=generator(name, step)) * size
        p.grad = grad.to(p.device, p.dtype)


def optimizer(given: dict[str, nn.Parameter], **options) -> gk.AdamW8bit:
    return gk.AdamW8bit(list(given.items()), **{"lr": 1e-4} | options)


def run(given: dict[str, nn.Parameter], steps: int = 3, **options) -> gk.AdamW8bit:
    opt = optimizer(given, **options)
    for step in range(steps):
        give_gradients(given, step)
        opt.step()
    return opt


def values(given: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in given.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def masters(opt: gk.AdamW8bit) -> list[Tensor]:
    """float32 values of bfloat16 parameters at master_bits 32."""
    made = []
    for p, state in opt.state.items():
        bits = (p.detach().view(torch.int16).int() << 16) + state["low_bits"].int()
        made.append(bits.view(F32))
    return made


@pytest.mark.parametrize("codec", ["dynamic", "fp8"])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_first_step_is_adamws_and_later_ones_within_the_code(dtype, codec) -> None:
    given = parameters(dtype)
    plain = {name: nn.Parameter(p.detach().float().clone()) for name, p in given.items()}
    opt = optimizer(given, master_bits=32, codec=codec, weight_decay=0.1)
    theirs = torch.optim.AdamW(plain.values(), lr=1e-4, weight_decay=0.1)
    start = {name: p.detach().clone() for name, p in plain.items()}
    for step in range(5):
        give_gradients(given, step)
        for name, p in plain.items():
            p.grad = given[name].grad.float()
        opt.step()
        theirs.step()
        ours = masters(opt) if dtype is BF16 else list(given.values())
        moved = [(p - start[name]).detach() for name, p in plain.items()]
        errors = [(a.detach() - b.detach()).flatten() for a, b in zip(ours, plain.values())]
        error = torch.cat(errors).norm() / torch.cat([m.flatten() for m in moved]).norm()
        assert error < (1e-4 if step == 0 else 0.15), step


@pytest.mark.parametrize("options", [{"master_bits": 16}, {}, {"master_bits": 32, "codec": "fp8"}],
                         ids=["16", "24", "32-fp8"])  # fmt: skip
@pytest.mark.parametrize("target", NATIVE, ids=str)
def test_every_backend_has_the_references_bits(target: Target, options: dict) -> None:
    shapes = SHAPES | {"long": (40_000,), "blocks": (3, 256)}
    found = []
    for backend in ("reference", target.backend):
        with gk.use_backend(backend):
            given = parameters(shapes=shapes, device=target.device)
            given |= {f"{k}32": p for k, p in parameters(F32, SHAPES, target.device).items()}
            opt = run(given, **options)
        states = [v for s in opt.state.values() for v in s.values() if isinstance(v, Tensor)]
        found.append([*values(given).values(), *states])
    for ours, reference in zip(found[1], found[0], strict=True):
        assert torch.equal(ours, reference)
    weight, version = given["weight"], given["weight"]._version
    with gk.use_backend(target.backend):
        opt.step(zero_grad=True)
    assert weight._version > version and not any(p.grad.any() for p in given.values())


def test_seeds_of_many_parameters_are_those_of_each() -> None:
    for seed, step in ((0, 1), (-5, 7), (2**63 + 11, 2**40)):
        words = seed_words(seed, step, torch.arange(50)).tolist()
        assert [w % 2**64 for w in words] == [seed_word(seed, step, i) for i in range(50)]


def test_the_seed_alone_decides_what_is_rounded_up() -> None:
    found = []
    for seed in (0, 0, 1):
        given = parameters()
        run(given, seed=seed)
        found.append(torch.cat([v.flatten() for v in values(given).values()]))
    assert torch.equal(found[0], found[1])
    states = []
    for seed in (0, 1):
        opt = run(parameters(), seed=seed)
        states.append(torch.cat([s["low_bits"].flatten() for s in opt.state.values()]))
    assert not torch.equal(*states)


def test_at_a_tiny_lr_24_bits_move_what_bfloat16_to_nearest_does_not() -> None:
    moved = {}
    for name in ("ours", "torch"):
        given = parameters(shapes={"weight": (64, 64)})
        before = values(given)["weight"]
        opt = (
            optimizer(given, lr=2e-6, weight_decay=0)
            if name == "ours"
            else torch.optim.AdamW(given.values(), lr=2e-6, weight_decay=0)
        )
        for _ in range(30):  # 30 steps of 2e-6, for weights whose neighbours are up to 1.2e-4 away
            given["weight"].grad = torch.full((64, 64), 1e-6, dtype=BF16)
            opt.step()
        moved[name] = (given["weight"] != before).float().mean()
        if name == "ours":
            low_bits = opt.state[given["weight"]]["low_bits"]
            master = join_master(given["weight"].detach(), low_bits, 8)
    assert moved["torch"] < 0.1 and moved["ours"] > 0.5
    # eps is a hundredth of the gradient
    assert (master - before.float()).mean().item() == pytest.approx(-30 * 2e-6 / 1.01, rel=0.01)


def test_groups_have_numbers_of_their_own_and_schedulers_set_them() -> None:
    one, other = parameters(shapes={"a": (40,)}), parameters(shapes={"b": (50,)})
    groups = [
        {"params": list(one.items()), "lr": 1e-3, "betas": (0.5, 0.9), "weight_decay": 0.5},
        {"params": list(other.items()), "eps": 1e-3},
    ]
    opt = gk.AdamW8bit(groups, lr=1e-4, master_bits=32)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: min(1.0, step / 2))
    start = values(one | other)
    give_gradients(one | other)
    opt.step()  # lr 0
    assert_same(values(one | other), start)
    assert all(state["exp_avg_scale"].min() > 0 for state in opt.state.values())
    alone = []
    for given, options in ((parameters(shapes={"a": (40,)}), groups[0]),
                           (parameters(shapes={"b": (50,)}), groups[1])):  # fmt: skip
        numbers = {k: options[k] for k in ("betas", "eps", "weight_decay") if k in options}
        lr = {"a": 1e-3, "b": 1e-4}[next(iter(given))]
        single = optimizer(given, master_bits=32, lr=lr, **numbers)
        for step, factor in enumerate((0.0, 0.5, 1.0)):
            single.param_groups[0]["lr"] = factor * lr
            give_gradients(given, step)
            single.step()
        alone.append(values(given))
    for step in (1, 2):
        schedule.step()
        give_gradients(one | other, step)
        opt.step()
    assert_same(values(one | other), alone[0] | alone[1])


def test_closure_and_parameters_without_gradients() -> None:
    given = parameters()
    opt = optimizer(given)

    def closure() -> Tensor:
        loss = given["weight"].float().square().sum()
        loss.backward()
        return loss

    before = values(given)
    assert opt.step(closure).item() == pytest.approx(before["weight"].float().square().sum().item())
    assert opt.state[given["weight"]]["step"] == 1
    assert list(opt.state) == [given["weight"]]
    assert_same({**values(given), "weight": before["weight"]}, before)


def test_grad_scale_is_the_gradients_times_it_and_zero_grad_leaves_zeros() -> None:
    ours, scaled = parameters(), parameters()
    give_gradients(ours)
    give_gradients(scaled, size=1e-3 / 4)
    wide = torch.randn(33, 24, generator=generator("wide"))
    ours["weight"].grad = wide.to(BF16).T  # not contiguous
    scaled["weight"].grad = (wide.to(BF16) / 4).T.contiguous()
    optimizer(ours).step(grad_scale=torch.tensor(0.25), zero_grad=True)
    optimizer(scaled).step()
    assert_same(values(ours), values(scaled))
    assert all(not p.grad.any() for p in ours.values())
    assert scaled["weight"].grad.any()


@needs_grad_dtype
@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    ours, expected = parameters(shapes={"a": (300,)}), parameters(shapes={"a": (300,)})
    grad = (torch.randn(300, generator=generator("gradient"))).to(dtype)
    for given, as_dtype in ((ours, dtype), (expected, F32)):
        given["a"].grad_dtype = as_dtype
        given["a"].grad = grad.to(as_dtype)
        optimizer(given).step(grad_scale=1 / 256)
    assert_same(values(ours), values(expected))


def test_factored_gradients_are_stepped_as_dense_ones_and_dropped() -> None:
    found = []
    for factored in (True, False):
        torch.manual_seed(0)
        linear = nn.Linear(40, 24)
        if factored:
            gk.factor_gradients([linear])
        opt = gk.AdamW8bit(linear.named_parameters(), lr=1e-3)
        for step in range(3):
            x = torch.randn(2, 40, generator=generator(step))
            linear(x).square().sum().backward()
            assert hasattr(linear.weight, "grad_factors") == factored
            opt.step(zero_grad=True)
            assert not hasattr(linear.weight, "grad_factors")
        found.append(values(dict(linear.named_parameters())))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=2e-5)
    gk.factor_gradients([linear])
    opt.zero_grad()
    linear(x).sum().backward()
    opt.zero_grad()
    assert not hasattr(linear.weight, "grad_factors") and linear.bias.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_moves_nothing_and_is_named(bad: float) -> None:
    given, undisturbed = parameters(), parameters()
    opt = run(given)
    run(undisturbed, 4)
    before, saved = values(given), opt.state_dict()["state"]
    steps = [state["step"] for state in saved.values()]
    give_gradients(given, 3)
    given["conv"].grad[0, 0, 0, 0] = bad
    given["scalar"].grad.fill_(bad)
    opt.step(zero_grad=True)
    assert (opt.skipped_steps, opt.last_non_finite) == (1, ["scalar", "conv"])
    assert_same(values(given), before)
    assert [state["step"] for state in opt.state.values()] == steps
    assert all(not p.grad.any() for p in given.values())  # also the bad ones, if asked to
    give_gradients(given, 3)
    opt.step()
    assert opt.skipped_steps == 1
    assert_same(values(given), values(undisturbed))


def test_what_is_not_finite_is_named_by_place_and_with_a_scale_it_was_made_of() -> None:
    linear = nn.Linear(8, 4)
    gk.factor_gradients([linear])
    opt = gk.AdamW8bit(linear.parameters())
    linear(torch.full((1, 8), math.inf)).sum().backward()
    opt.step()
    assert opt.last_non_finite == ["group 0, parameter 0"]
    opt.zero_grad()
    linear(torch.full((1, 8), 1e30)).sum().backward()  # its square overflows float32: it is finite
    linear.bias.grad.fill_(3e38)
    opt.step()
    assert opt.skipped_steps == 1
    opt.step(grad_scale=math.nan)
    assert (opt.skipped_steps, opt.last_non_finite) == (2, ["grad_scale"])
    linear.bias.grad.fill_(math.nan)
    opt.step(grad_scale=math.inf)
    assert (opt.skipped_steps, opt.last_non_finite) == (3, ["group 0, parameter 1"])
