"""StreamedAdamW: torch's AdamW on float32 copies, to the bit."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from g2rpo import streamed_adamw
from g2rpo.streamed_adamw import StreamedAdamW

SHAPES = [(), (5,), (33, 17), (2, 3, 4), (0, 3), (256,)]
GIVEN = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def parameters_of(dtype, device="cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(value.to(device, dtype)) for value in values]


def set_gradients(parameters, step: int, skip: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(parameters):
        grad = torch.randn(parameter.shape, generator=generator)
        grad = grad.to(torch.bfloat16).to(parameter.device, parameter.dtype)  # the same in each
        parameter.grad = None if index == skip else grad


def assert_same_state(optimizer, reference, mine, theirs) -> None:
    for parameter, copied in zip(mine, theirs, strict=True):
        state, expected = optimizer.state[parameter], reference.state[copied]
        assert state["step"] == int(expected["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], expected[name].cpu()) and state[name].is_cpu
            assert state[name].dtype == torch.float32
        if "master" in state:
            assert torch.equal(state["master"], copied.detach().cpu())
        assert torch.equal(parameter.detach(), copied.detach().to(parameter.dtype))


def run_beside_torch(dtype, device="cpu") -> None:
    mine = parameters_of(dtype, device)
    theirs = [nn.Parameter(p.detach().float()) for p in mine]
    optimizer = StreamedAdamW(mine, **GIVEN)
    reference = torch.optim.AdamW(theirs, **GIVEN, fused=True)
    for step in range(5):
        for parameters in (mine, theirs):
            set_gradients(parameters, step, skip=2 if step == 3 else None)
        for group in (*optimizer.param_groups, *reference.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        reference.step()
        assert_same_state(optimizer, reference, mine, theirs)
    assert ("master" in optimizer.state[mine[2]]) == (dtype is not torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_torchs_on_float32_copies(dtype):
    run_beside_torch(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the streams are a CUDA GPU's")
def test_it_is_torchs_on_a_gpu(dtype):
    run_beside_torch(dtype, "cuda")
    optimizer = StreamedAdamW(parameters_of(dtype, "cuda"))
    set_gradients(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert all(s["exp_avg"].is_pinned() for s in optimizer.state.values() if len(s["exp_avg"]))


class Stream:
    """A stream that does at once what it is told, and keeps who has waited for whom."""

    def __init__(self) -> None:
        self.done, self.seen = 0, set()

    def record_event(self) -> tuple["Stream", int]:
        self.done += 1
        return self, self.done

    def wait_event(self, event: tuple["Stream", int]) -> None:
        self.seen.add(event)

    def wait_stream(self, other: "Stream") -> None:
        self.seen.add((other, other.done))

    def synchronize(self) -> None:
        self.seen.add("host")


def test_streams_share_two_buffers(monkeypatch):
    """What a GPU is asked to do, done on the CPU: the same bits, and each wait that it needs."""
    made, here = [], Stream()

    def new_stream() -> Stream:
        made.append(Stream())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    mine = parameters_of(torch.bfloat16)
    theirs = [nn.Parameter(p.detach().float()) for p in mine]
    optimizer = StreamedAdamW(mine, **GIVEN)
    reference = torch.optim.AdamW(theirs, **GIVEN, fused=True)
    for step in range(3):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        optimizer._make_states(mine)
        with torch.no_grad():
            optimizer._stream(torch.device("cpu"), [(optimizer.param_groups[0], p) for p in mine])
        reference.step()
        assert_same_state(optimizer, reference, mine, theirs)
        inwards, outwards = made[-2:]
        count = len(mine)
        # A copy in waits until the buffer's last state has left; an update for the copy in; a copy
        # out for the update; the end for all copies out, the host's too.
        assert {(outwards, i) for i in range(1, count - 1)} <= inwards.seen
        assert {(inwards, i) for i in range(1, count + 1)} <= here.seen
        assert len([e for e in outwards.seen if e != "host" and e[0] is here]) == count
        assert (outwards, count) in here.seen and "host" in outwards.seen


@pytest.mark.parametrize("chunk", [1, 700, 2**30])
def test_states_lie_in_few_allocations(monkeypatch, chunk):
    monkeypatch.setattr(streamed_adamw, "CHUNK", chunk)
    run_beside_torch(torch.bfloat16)
    parameters = parameters_of(torch.bfloat16)
    set_gradients(parameters, 0)
    optimizer = StreamedAdamW(parameters)
    optimizer.step()
    storages = {s["exp_avg"].untyped_storage().data_ptr() for s in optimizer.state.values()}
    assert len(storages) == {1: 6, 700: 4, 2**30: 1}[chunk]


def test_small_steps_are_not_lost():
    """At lr 2e-6 a bfloat16 weight of 1 moves after 2,000 steps, as its master does."""
    plain, streamed = (nn.Parameter(torch.ones(8, dtype=torch.bfloat16)) for _ in range(2))
    given = {"lr": 2e-6, "weight_decay": 0.0}
    for optimizer in (torch.optim.AdamW([plain], **given), StreamedAdamW([streamed], **given)):
        for _ in range(2000):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(8, dtype=torch.bfloat16)
            optimizer.step()
    assert (plain == 1).all()
    assert (streamed == torch.tensor(1 - 0.004).bfloat16()).all()


def test_weights_that_do_not_lie_in_order():
    mine = nn.Parameter(torch.arange(12.0).view(3, 4).T)
    theirs = nn.Parameter(torch.arange(12.0).view(3, 4).T.contiguous())
    grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mine.grad, theirs.grad = grad.T.contiguous().T, grad
    StreamedAdamW([mine], lr=0.1).step()
    torch.optim.AdamW([theirs], lr=0.1, fused=True).step()
    assert torch.equal(mine, theirs) and not torch.equal(mine[0], torch.tensor([0.0, 4.0, 8.0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_dict_goes_on_to_the_bit(dtype):
    """Through a file; the loaded state is a copy and in float32."""
    straight = parameters_of(dtype)
    optimizer = StreamedAdamW(straight, **GIVEN)
    for step in range(4):
        if step == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            weights = copy.deepcopy(straight)
        set_gradients(straight, step)
        optimizer.step()
    file.seek(0)
    resumed = StreamedAdamW(weights, lr=1.0)
    state = torch.load(file, weights_only=True)
    resumed.load_state_dict(state)
    for tensor in (v for s in state["state"].values() for v in s.values() if v is not s["step"]):
        tensor.fill_(7.0)
    for step in (2, 3):
        set_gradients(weights, step)
        resumed.step()
    for a, b in zip(straight, weights, strict=True):
        assert torch.equal(a, b)
        for name, value in optimizer.state[a].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[b][name]))


def test_other_states_are_refused():
    (a, b), (c,) = (parameters_of(torch.bfloat16)[1:3], parameters_of(torch.float32)[1:2])
    optimizers = StreamedAdamW([a]), StreamedAdamW([b]), StreamedAdamW([c])
    for parameter, optimizer in zip((a, b, c), optimizers, strict=True):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    before = optimizers[0].state[a]["master"].clone()
    with pytest.raises(ValueError, match=r"exp_avg is torch.float32 \(33, 17\); expected float32 "):
        optimizers[0].load_state_dict(optimizers[1].state_dict())
    with pytest.raises(ValueError, match="state has .'exp_avg', 'exp_avg_sq', 'step'.; expected"):
        optimizers[0].load_state_dict(optimizers[2].state_dict())
    rounded = optimizers[0].state_dict()
    rounded["state"][0] = {
        n: v.bfloat16() if n == "master" else v for n, v in rounded["state"][0].items()
    }
    with pytest.raises(ValueError, match="master is torch.bfloat16"):
        optimizers[0].load_state_dict(rounded)
    with pytest.raises(ValueError, match="parameter group"):
        optimizers[0].load_state_dict(StreamedAdamW([a, b]).state_dict())
    assert torch.equal(optimizers[0].state[a]["master"], before)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"lr": 0.0}, "lr is 0.0; expected > 0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); expected in \[0, 1\)"),
        ({"eps": -1.0}, "eps is -1.0; expected >= 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        StreamedAdamW([nn.Parameter(torch.ones(2))], **given)


def test_bad_parameters_and_gradients():
    with pytest.raises(ValueError, match="a parameter is torch.float64; expected float32, bfl"):
        StreamedAdamW([nn.Parameter(torch.ones(2, dtype=torch.float64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = StreamedAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="a gradient is sparse; expected dense ones"):
        optimizer.step()


def test_closures_and_schedulers():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = StreamedAdamW([parameter], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(parameter.detach(), torch.full((2,), 0.9))
