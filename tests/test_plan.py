"""`g2rpo plan`: the design's own numbers, what it shows, what it advises, wrong input."""

import json
import re

import pytest
from plan_configs import config_of

from g2rpo import arguments as args
from g2rpo import cli
from g2rpo.plan import as_json, make_plan, speed
from g2rpo.plan.cards import CARDS, GIB, find_card
from g2rpo.plan.gpus import Gpus
from g2rpo.plan.memory import completion_evaluations, plan_memory, trained
from g2rpo.plan.model import FLUX_ENCODERS, sizes_of
from g2rpo.plan.speed import forward_flops, plan_work
from g2rpo.schedule import evaluations_per_prompt

FLUX = "black-forest-labs/FLUX.1-dev"
H100 = CARDS["h100-80gb"]
PRESETS = ("flux-dev-1gpu", "flux-dev-8gpu", "flux-dev-paper")


@pytest.fixture(scope="module")
def flux():
    """FLUX.1-dev's sizes at 720 x 720."""
    return sizes_of(config_of("flux-dev-1gpu"))


def test_the_designs_own_numbers(flux):
    assert flux.parameters == 11_901_408_320
    assert (flux.image, flux.text) == (2025, 512)
    assert forward_flops(flux) / 1e12 == pytest.approx(37.3, abs=0.05)
    larger = "--rollout.height", 1024, "--rollout.width", 1024
    at_1024 = sizes_of(config_of("flux-dev-1gpu", *larger))
    assert forward_flops(at_1024) / 1e12 == pytest.approx(74.4, abs=0.05)
    config = config_of("flux-dev-1gpu")
    rollout = config.rollout
    assert evaluations_per_prompt(16, rollout.sde_positions, [1, 2], 12) == 1504
    assert completion_evaluations(config) + 8 == 1504  # the anchor's own, up to its last position
    assert plan_work(config, flux, H100).evaluations == 16 * (1504 + 8)
    assert flux.fp8_bytes == pytest.approx(8.61e9, rel=1e-3)

    made = trained(config, flux)
    n = flux.parameters
    assert made.weights == 2 * n and made.low_bits == n
    assert made.moments / n == pytest.approx(2.03, abs=0.002)
    assert made.gradients / 2 == pytest.approx(8.66e9, rel=2e-3)  # modulations are factored
    static = made.weights + made.low_bits + made.moments + made.gradients
    assert static / GIB == pytest.approx(71.9, abs=0.1)
    dense = static + 2 * flux.modulation
    assert dense / GIB == pytest.approx(77.9, abs=0.1)
    config.optimizer.name, config.model.dtype = "adamw", "float32"
    made = trained(config, flux)
    assert made.weights + made.moments + made.gradients == 16 * n  # 190 GB


def test_encoders_are_counted_as_transformers_has_them():
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, d_kv=64, vocab_size=32128,
                  feed_forward_proj="gated-gelu")  # fmt: skip
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                          num_attention_heads=12, vocab_size=49408)  # fmt: skip
    with torch.device("meta"):
        models = T5EncoderModel(t5), CLIPTextModel(clip)
    assert FLUX_ENCODERS == sum(p.numel() for model in models for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_say_what_is_predicted(name, flux):
    """The comment of a preset: its peak, minutes, GPU-hours of all its GPUs, and communication."""
    text = args.find_preset(name).read_text()
    config = config_of(name)
    assert config.optimizer.lr == 2e-6 and config.rollout.group_size == 12  # the paper's
    assert config.train.prompts_per_update == 16
    gpu, _, gpus = re.search(rf"g2rpo plan {name} --gpu ([\w-]+)( --gpus (\d+))?", text).groups()
    plan = make_plan(config, CARDS[gpu], gpus=Gpus(int(gpus or 1)), sizes=flux)
    found = re.search(
        r"peak ([\d.]+) GiB, ([\d.]+) minutes an update, ([\d,]+) GPU-hours( of all (\w+))?", text
    )
    assert float(found[1]) == round(plan.peak / GIB, 1)
    assert float(found[2]) == round(plan.seconds / 60, 1)
    assert float(found[3].replace(",", "")) == pytest.approx(plan.hours, abs=0.5)
    assert {None: None, "eight": "8", "sixteen": "16"}[found[5]] == gpus
    if gpus is not None:
        sent = re.search(r"([\d.]+) s of an update is communication: ([\d.]+) %", text)
        assert float(sent[1]) == round(plan.communication, 1)
        assert float(sent[2]) == round(100 * plan.efficiency, 1)
        assert f"--nproc-per-node 8 -m g2rpo train {name}" in text or "--nnodes 2" in text
    assert "redicted, not" in text and "measured" in text
    assert plan.fits


def test_what_makes_room_is_planned_anew(flux):
    config = config_of("flux-dev-1gpu", "--optimizer.offload", "false")
    plan = make_plan(config, H100)
    assert not plan.fits and plan.peak_phase == "backward"
    found = {switch.change: switch for switch in plan.switches}
    for change in ("--optimizer.offload true", "--rollout.branch_batch 1", "--model.lora.rank 64"):
        key, value = change.split()
        changed = config_of("flux-dev-1gpu", "--optimizer.offload", "false", key, value)
        assert found[change].peak == plan_memory(changed, flux).peak
        assert found[change].fits == (found[change].peak <= H100.usable)
    assert found["--optimizer.offload true"].fits
    assert "--model.gradient_checkpointing true" not in found  # it is on

    config = config_of("flux-dev-1gpu", "--optimizer.offload", "false",
                       "--model.gradient_checkpointing", "false")  # fmt: skip
    plan = make_plan(config, H100)
    together = min(plan.switches, key=lambda s: s.peak if "lora" not in s.change else 1e18)
    assert together.fits and together.change.count("--") == 2
    config.optimizer.offload = config.model.gradient_checkpointing = True
    assert together.peak == plan_memory(config, flux).peak


def test_each_knob_does_what_it_is_for(flux):
    def totals(*changes):
        return plan_memory(config_of("flux-dev-1gpu", *changes), flux).totals

    base = totals()
    assert base["completions"] - totals("--rollout.precision", "null")["completions"] > 7 * GIB
    kept = totals("--optimizer.offload", "false")
    states = 3.03 * flux.parameters
    assert kept["anchor"] - base["anchor"] == pytest.approx(states, rel=0.01)
    assert kept["step"] == base["step"]
    assert "embed" not in totals("--data.embeddings", "somewhere")
    without = totals("--model.gradient_checkpointing", "false")
    assert without["backward"] > 4 * base["backward"]
    host = plan_memory(config_of("flux-dev-1gpu", "--train.ema", 0.99), flux).host
    assert dict(host)["moving average"] == 6 * flux.parameters
    streamed = config_of("flux-dev-1gpu", "--optimizer.offload", "false",
                         "--optimizer.name", "adamw_streamed")  # fmt: skip
    assert trained(streamed, flux).streamed == 12 * flux.parameters


def results(folder, machine, **content):
    file = folder / f"{content['kind']}-a.json"
    file.write_text(json.dumps({"size": "flux", "machine": {"name": machine}, **content}))


def test_a_measurement_of_that_card_is_used_and_named(tmp_path, flux):
    config = config_of("flux-dev-1gpu")
    case = {"batch": 12, "tokens": 2537, "flops": 12e12,
            "variants": {"ours, rollout, FP8": {"seconds": 0.01}}}  # fmt: skip
    larger = {**case, "tokens": 4608, "flops": 5e12}  # images of another size
    results(tmp_path, "NVIDIA H200", kind="flux-forward", cases=[larger, case])
    before = plan_work(config, flux, H100, tmp_path)
    assert all("measured" not in phase.basis for phase in before.phases)
    after = plan_work(config, flux, CARDS["h200"], tmp_path)
    completions = next(phase for phase in after.phases if phase.name == "completions")
    assert completions.basis == "measured: flux-forward-a.json"
    assert completions.flops / completions.seconds == pytest.approx(1.2e15)
    assert sum("measured" in phase.basis for phase in after.phases) == 1


def test_a_measured_update_stands_beside_the_estimate(tmp_path, monkeypatch, capsys):
    case = {"preset": "flux-dev-1gpu", "overrides": [],
            "peak_bytes": {"weights": 1, "anchor": 30 * GIB, "update": 71 * GIB},
            "phases": {"anchor": 8.0, "completions": 1000.0, "update": 50.0}}  # fmt: skip
    results(tmp_path, H100.devices[0], kind="flux-update", cases=[case])
    measured = speed.measured_update
    monkeypatch.setattr("g2rpo.plan.measured_update", lambda *a: measured(*a, tmp_path))
    assert cli.main(["plan", "flux-dev-1gpu", "--gpu", "h100-80gb"]) == 0
    out = capsys.readouterr().out
    assert "71.00 GiB at most, in step (measured, flux-update-a.json)" in " ".join(out.split())
    assert "measured: flux-update-a.json" in out and "16 min 40 s" in out
    changed = ["--gpu", "h100-80gb", "--rollout.eta", "0.6"]
    assert cli.main(["plan", "flux-dev-1gpu", *changed]) == 0
    assert "(measured" not in capsys.readouterr().out


def test_output_says_estimated_and_fits_one_screen(capsys):
    assert cli.main(["plan", "flux-dev-1gpu", "--gpu", "h100-80gb", "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    assert "GPU memory, GiB (estimated)" in out and "One update (estimated)" in out
    assert "GiB at most, in step (estimated)" in out and "published" in out and "$" in out
    assert "measured" not in out
    lines = out.splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 100
    assert cli.main(["plan", "flux-dev-1gpu", "--gpu", "48GB"]) == 1
    out = capsys.readouterr().out
    assert "It does not fit" in out and "What makes room" in out and "name a GPU" in out


def test_json_is_the_same(capsys):
    assert cli.main(["plan", "digits", "--gpu", "l40s", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    plan = make_plan(config_of("digits"), CARDS["l40s"], "digits")
    assert shown == json.loads(json.dumps(as_json(plan)))
    assert shown["peak"] == max(shown["memory"]["totals"].values()) and shown["fits"]
    assert shown["work"]["seconds_per_update"] is None  # no rate is true of so small a model


def test_a_folder_is_read(miniature):
    config = config_of("flux-lora", "--model.path", miniature, "--rollout.height", 32,
                       "--rollout.width", 32)  # fmt: skip
    sizes = sizes_of(config)
    assert str(miniature) in sizes.source and sizes.parameters < 10**7
    assert sizes.encoder_bytes > 0 and sizes.vae_parameters > 0


def test_memory_sizes():
    assert find_card("80GB").bytes == find_card("80GiB").bytes == find_card("80g").bytes == 80 * GIB
    assert find_card("H100-80GB") is H100
    assert 75.5 < H100.usable / GIB < 76.5


MISTAKES = {
    "unknown GPU": (["flux-lora", "--gpu", "h1000"], ["'h1000'", "h100-80gb", "80GB"]),
    "no GPU": (["flux-lora"], ["--gpu is not given", "h100-80gb"]),
    "no value": (["flux-lora", "--gpu"], ["--gpu has no value"]),
    "no memory": (["flux-lora", "--gpu", "0GB"], ["--gpu is '0GB'"]),
    "price": (["flux-lora", "--gpu", "h200", "--price", "x"], ["--price is 'x'"]),
    "no FP8": (["flux-dev-1gpu", "--gpu", "a100-80gb"], ["rollout.precision is 'fp8'", "null"]),
    "unknown model": (
        ["flux-lora", "--gpu", "h200", "--model.path", "somebody/model"],
        ["model.path is 'somebody/model'", FLUX],
    ),
    "bad size": (
        ["flux-lora", "--gpu", "h200", "--rollout.height", 700], ["rollout.height is 700", "704"],
    ),
    "no preset": (["--gpu", "h200"], ["no preset given"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_input(case, capsys):
    arguments, said = MISTAKES[case]
    assert cli.main(["plan", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in said), error
