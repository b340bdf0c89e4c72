"""FluxRollout: the velocities of a plain forward, by every mode, for the weights of now."""

import pytest
import torch
from test_fuse_flux import TINY, error, inputs, new_flux, run
from tiny import TinyModel, brightness, tiny_config
from torch.fx.experimental.proxy_tensor import make_fx

import g2rpo_kernels as gk
from g2rpo.errors import ConfigurationError
from g2rpo.rewards import Reward
from g2rpo.trainer import Trainer
from g2rpo_kernels import flux_rollout

SIGMAS = torch.tensor([1.0, 0.7, 0.2])
PROMPTS, INDEX = torch.tensor([1, 0, 0, 1]), torch.tensor([1, 0, 2, 2])


def captured_on_the_cpu(forward):
    """What a CUDA graph does: the operations that ran, on the memory that they ran on, again."""
    traced = make_fx(forward)()
    output = forward().clone()

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1
            output.copy_(traced())

    return output, Graph()


@pytest.fixture
def graph_mode(monkeypatch):
    """Lets `mode="graph"` run without a GPU, by recording the operations."""
    monkeypatch.setattr(flux_rollout, "capture", captured_on_the_cpu)

    def make(model, ids, guidance, **options):
        rollout = gk.FluxRollout(model, ids, guidance, **options)
        rollout.mode = "graph"
        return rollout

    return make


def given_to(model, seed=0):
    """Inputs of a plain forward and, of two prompts at three sigmas, what a rollout is given."""
    given = inputs(model, batch=4, image=9)
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(2, *given["encoder_hidden_states"].shape[1:], generator=generator)
    pooled = torch.randn(2, 32, generator=generator)
    given["hidden_states"] = torch.randn(given["hidden_states"].shape, generator=generator)
    given["timestep"] = SIGMAS[INDEX]
    given["encoder_hidden_states"], given["pooled_projections"] = embeds[PROMPTS], pooled[PROMPTS]
    return given, (SIGMAS, embeds, pooled)


def plain(model, given):
    with torch.no_grad():
        return run(model, given)


@pytest.mark.parametrize("guidance", [3.5, None])
@pytest.mark.parametrize("singles", [2, 0])
def test_velocities_of_a_plain_forward(guidance, singles):
    sizes = {"guidance_embeds": guidance is not None, "num_single_layers": singles}
    model = gk.fuse_flux(new_flux({**TINY, **sizes}))
    given, known = given_to(model)
    given["guidance"] = None if guidance is None else torch.full((4,), guidance)
    expected = plain(model, given)
    rollout = gk.FluxRollout(model, given["img_ids"], guidance)
    calls = []
    linears = [model.context_embedder, model.norm_out.linear]
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        linears.append((getattr(block, "norm1", None) or block.norm).linear)
    for linear in linears:
        linear.register_forward_hook(lambda *_: calls.append(1))
    with rollout.of(*known):
        once = len(calls)
        ours = rollout(given["hidden_states"], PROMPTS, INDEX)
        again = rollout(given["hidden_states"].flip(0), PROMPTS.flip(0), INDEX.flip(0))
        other = rollout(given["hidden_states"], 1 - PROMPTS, INDEX)
    assert once == len(linears) == len(calls)
    assert error(ours, expected) < 1e-5 and torch.equal(again.flip(0), ours)
    assert error(other, expected) > 1e-3
    assert torch.equal(plain(model, given), expected)


def test_weights_of_now():
    """What was computed from other weights is not used again."""
    model = gk.fuse_flux(new_flux())
    given, known = given_to(model)
    rollout = gk.FluxRollout(model, given["img_ids"], 3.5)
    with rollout.of(*known):
        before = rollout(given["hidden_states"], PROMPTS, INDEX)
    model.load_state_dict(new_flux(seed=4).state_dict())
    with rollout.of(*known):
        after = rollout(given["hidden_states"], PROMPTS, INDEX)
    assert error(after, plain(model, given)) < 1e-5 < error(before, after)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_captured_forward(graph_mode, fp8):
    """The first forward of a shape runs, the second is captured, all from there on replayed."""
    model = gk.fuse_flux(new_flux())
    precision = gk.Fp8Rollout(model, emulate=True) if fp8 else torch.no_grad()
    given, known = given_to(model)
    rollout, eager = (
        make(model, given["img_ids"], 3.5) for make in (graph_mode, gk.FluxRollout)
    )
    latents = [torch.randn(4, *given["hidden_states"].shape[1:]) for _ in range(5)]
    with precision:
        for seed in (1, 2):  # of prompts: what is captured belongs to one block
            _, known = given_to(model, seed)
            with rollout.of(*known), eager.of(*known):
                for i, x in enumerate(latents):
                    rows = PROMPTS.roll(i), INDEX.roll(-i)
                    ours = rollout(x, *rows)
                    assert error(ours, eager(x, *rows)) < 1e-6
                    assert (rollout._replay is not None) is (i > 0)
                assert rollout._replay._graph.replays == 4
                narrow = rollout(latents[0][:2], PROMPTS[:2], INDEX[:2])  # another shape
                assert error(narrow, eager(latents[0][:2], PROMPTS[:2], INDEX[:2])) < 1e-6
            assert rollout._replay is rollout._known is None


def test_compiled():
    model = gk.fuse_flux(new_flux({**TINY, "num_layers": 1, "num_single_layers": 1}))
    given, known = given_to(model)
    rollout = gk.FluxRollout(model, given["img_ids"], 3.5, mode="compile")
    expected = plain(model, given)
    with rollout.of(*known):
        assert error(rollout(given["hidden_states"], PROMPTS, INDEX), expected) < 1e-5


def test_what_cannot_be_captured(monkeypatch, graph_mode):
    model = gk.fuse_flux(new_flux())
    given, known = given_to(model)
    x, said = given["hidden_states"], []

    def fails(forward):
        forward()
        raise error_of_torch

    monkeypatch.setattr(flux_rollout, "capture", fails)
    error_of_torch = RuntimeError("operation not permitted when stream is capturing\nmore")
    strict = graph_mode(model, given["img_ids"], 3.5)
    with strict.of(*known), pytest.raises(RuntimeError, match="cannot be captured: operation not"):
        strict(x, PROMPTS, INDEX)
        strict(x, PROMPTS, INDEX)
    told = graph_mode(model, given["img_ids"], 3.5, on_eager=said.append)
    with told.of(*known):
        outputs = [told(x, PROMPTS, INDEX) for _ in range(3)]
    assert said == ["operation not permitted when stream is capturing"] and told.mode == "eager"
    assert all(torch.equal(outputs[0], other) for other in outputs)
    error_of_torch = torch.OutOfMemoryError("out of memory")  # for the trainer, which makes room
    told.mode = "graph"
    with told.of(*known), pytest.raises(torch.OutOfMemoryError):
        told(x, PROMPTS, INDEX)
        told(x, PROMPTS, INDEX)


def test_refusals():
    ids = torch.zeros(9, 3)
    with pytest.raises(ValueError, match="is not fused"):
        gk.FluxRollout(new_flux(), ids, 3.5)
    model = gk.fuse_flux(new_flux())
    with pytest.raises(ValueError, match="mode is 'fast'; expected one of"):
        gk.FluxRollout(model, ids, 3.5, mode="fast")
    with pytest.raises(ValueError, match="'graph' on cpu; expected a CUDA GPU"):
        gk.FluxRollout(model, ids, 3.5, mode="graph")
    with pytest.raises(RuntimeError, match="outside of"):
        gk.FluxRollout(model, ids, 3.5)(torch.zeros(1, 9, 16), PROMPTS[:1], INDEX[:1])


# In the trainer ---------------------------------------------------------------------------------


def trainer_with(engine, fuse=True) -> Trainer:
    config = tiny_config()
    config.model.fuse, config.rollout.engine = fuse, engine
    config.validate()
    return Trainer(config, TinyModel(), [Reward("brightness", brightness)])


def test_engines_of_the_trainer(graph_mode):
    """The same rewards within rounding, the ratio exactly 1, and weights that follow."""
    rows = {}
    for engine in ("eager", "compile", "graph"):
        trainer = trainer_with("eager" if engine == "graph" else engine)
        trainer.sampling.engine._rollout.mode = engine
        found = [trainer.update() for _ in range(2)]
        assert all(row["ratio_max"] == 1.0 for row in found)
        rows[engine] = [row["rollout/brightness/mean"] for row in found]
    assert rows["compile"] == pytest.approx(rows["eager"], abs=1e-5)
    assert rows["graph"] == pytest.approx(rows["eager"], abs=1e-5)


def test_engines_that_are_refused():
    with pytest.raises(ConfigurationError, match="engine is 'graph'; expected .* model.fuse"):
        trainer_with("graph", fuse=False)
    with pytest.raises(ConfigurationError, match="'graph' and model.device 'cpu'; expected a CUDA"):
        trainer_with("graph")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_a_graph_gives_the_eager_bits_and_nothing_waits():
    model = gk.fuse_flux(new_flux().cuda().bfloat16())
    given, known = given_to(model.cpu())
    model.cuda()
    known = [x.cuda() for x in known]
    x, ids = given["hidden_states"].cuda(), given["img_ids"].cuda()
    rows = PROMPTS.cuda(), INDEX.cuda()
    eager, graph = (gk.FluxRollout(model, ids, 3.5, mode=mode) for mode in ("eager", "graph"))
    with eager.of(*known), graph.of(*known):
        for i in range(4):
            if i == 3:
                torch.cuda.set_sync_debug_mode("error")
            try:
                ours, expected = graph(x + i, *rows), eager(x + i, *rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(ours, expected)
