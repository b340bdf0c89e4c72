"""`g2rpo plan` of several GPUs: what it shows, the table over their number, wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_configs import config_of

from g2rpo import cli
from g2rpo.plan import as_json, make_plan
from g2rpo.plan.cards import CARDS, GIB, Card
from g2rpo.plan.gpus import Gpus, share_of
from g2rpo.plan.memory import plan_memory
from g2rpo.plan.model import sizes_of
from g2rpo.plan.scaling import plan_scaling
from g2rpo.plan.switches import decided

H100 = CARDS["h100-80gb"]


@pytest.fixture(scope="module")
def flux():
    return sizes_of(config_of("flux-dev-8gpu"))


def planned(capsys, *arguments, code=0):
    assert cli.main(["plan", *map(str, arguments)]) == code
    return capsys.readouterr().out


def test_one_gpu_is_as_without_the_options(capsys):
    for more in ([], ["--json"]):
        before = planned(capsys, "flux-dev-1gpu", "--gpu", "h100-80gb", *more)
        after = planned(capsys, "flux-dev-1gpu", "--gpu", "h100-80gb", "--gpus", 1, *more)
        assert after == before
    # The strategy of a run on one GPU changes nothing: there is nobody to share with.
    shard = planned(
        capsys, "flux-dev-1gpu", "--gpu", "h100-80gb", "--strategy", "shard", "--json"
    )
    assert shard == before and '"gpus"' not in shard


def test_auto_gathers_once_where_that_fits(flux):
    """On a card that just holds the copy, and on one that is a little short of it."""
    gpus = Gpus(16)
    config = share_of(config_of("flux-dev-paper", "--distributed.gradients", "sharded"), gpus)
    peaks = {}
    for gather in ("phase", "forward"):
        config.distributed.gather = gather
        peaks[gather] = plan_memory(config, flux, gpus=gpus).peak
    assert peaks["forward"] < peaks["phase"]
    config.distributed.gather = "auto"
    full = peaks["phase"]
    for usable, gather in ((full, "phase"), (full - 9, "forward"), (9, "forward")):
        card = Card("small", (usable + 0.75 * GIB + 1) / 0.97)
        own, found = decided(config, flux, card, gpus)
        assert (own.distributed.gather, found.peak) == (gather, peaks[gather])
    config.rollout.engine = "compile"  # of which only the copy is capable
    own, _ = decided(config, flux, card, gpus)
    assert own.distributed.gather == "phase" and config.distributed.gather == "auto"


def test_output_of_a_rank(capsys):
    out = planned(capsys, "flux-dev-8gpu", "--gpu", "h100-80gb", "--gpus", 8, "--price", 2)
    words = " ".join(out.split())
    for text in (
        "flux-dev-8gpu on 8 h100-80gb", "an update of one GPU: 2 prompts, 384 images",
        "16 prompts an update in all; what follows is of one GPU", "Strategy shard: 1/8 of the",
        "into a copy that fits (distributed.gather phase)", "blocks in flight", "whole copy",
        "Sent by a GPU, an update (estimated)", "assumed: 80% of NVLink's 450 GB/s",
        "if nothing of it is hidden, as is assumed here: a predicted scaling efficiency of 99.1%",
        "GPU-hours of all 8, $", "GPU memory, GiB (estimated)", "One update (estimated)",
    ):  # fmt: skip
        assert text in words, text
    assert "measured" not in out and max(map(len, out.splitlines())) <= 100
    network = planned(capsys, "flux-dev-8gpu", "--gpu", "h100-80gb", "--gpus", 16, "--network", 1)
    assert "assumed: 80% of the network's 8 x 1 GB/s a node" in " ".join(network.split())


def test_json_has_it_all(capsys):
    arguments = ["flux-dev-8gpu", "--gpu", "h100-80gb", "--gpus", 16, "--strategy", "hybrid"]
    shown = json.loads(planned(capsys, *arguments, "--json", "--price", 2))
    plan = make_plan(config_of("flux-dev-8gpu", "--distributed.strategy", "hybrid"), H100,
                     "flux-dev-8gpu", gpus=Gpus(16))  # fmt: skip
    assert shown == json.loads(json.dumps(as_json(plan, 2.0)))
    spread = shown["gpus"]
    assert (spread["count"], spread["strategy"], spread["gather"]) == (16, "hybrid", "phase")
    assert (spread["source"], spread["prompts_per_update"]) == ("estimated", 16)
    assert spread["communication_bytes"] == sum(each["bytes"] for each in spread["traffic"])
    assert spread["seconds_per_update"] == pytest.approx(
        shown["work"]["seconds_per_update"] + spread["communication_seconds"]
    )
    assert spread["evaluations_per_update"] == 16 * 1512  # a prompt each: 1504 drawn, 8 trained
    assert shown["work"]["gpu_hours"] == plan.hours > 16 * plan.work.hours


def test_what_makes_room_on_several(flux, capsys):
    plan = make_plan(
        config_of("flux-dev-paper", "--distributed.strategy", "replicate"), H100,
        gpus=Gpus(16), sizes=flux,
    )  # fmt: skip
    found = {switch.change: switch for switch in plan.switches}
    sharded = make_plan(config_of("flux-dev-paper"), H100, gpus=Gpus(16), sizes=flux)
    assert found["--distributed.strategy shard"].peak == sharded.peak
    assert found["--distributed.strategy shard"].fits and not plan.fits
    out = planned(capsys, "flux-dev-paper", "--gpu", "48GB", "--gpus", 16, code=1)
    assert "--distributed.gradients sharded" in out
    assert "--distributed.strategy" not in out and "adamw_streamed" not in out  # they are sharded
    one = planned(capsys, "flux-dev-paper", "--gpu", "b200", code=1)
    assert "--distributed" not in one.replace("--train.prompts_per_update", "")


def test_table_over_numbers(flux, capsys):
    arguments = ["flux-dev-8gpu", "--gpu", "h100-80gb", "--optimizer.offload", "true"]
    out = planned(capsys, *arguments, "--gpus", "64,8", "--price", 2)
    words = " ".join(out.split())
    assert "2 prompts a GPU at every number of them: train.prompts_per_update 16 over 8." in words
    assert "on several h100-80gb (estimated)" in words and "at $2" in words
    assert "nothing that is sent is taken to hide behind work" in words
    assert max(map(len, out.splitlines())) <= 100
    shown = json.loads(planned(capsys, *arguments, "--gpus", "64,8", "--json"))
    assert shown["source"] == "estimated" and shown["prompts_per_gpu"] == 2
    ways = [(row["gpus"], row["strategy"], row["gradients"]) for row in shown["rows"]]
    shard = ["whole", "sharded"]
    assert ways == [
        (8, "replicate", "whole"), *((8, "shard", g) for g in shard),
        (64, "replicate", "whole"), *((64, "shard", g) for g in shard),
        *((64, "hybrid", g) for g in shard),
    ]  # fmt: skip
    for row in shown["rows"]:
        plan = make_plan(
            config_of(*arguments[:1], *arguments[3:], "--distributed.strategy", row["strategy"],
                      "--distributed.gradients", row["gradients"],
                      "--train.prompts_per_update", 2 * row["gpus"]),
            H100, gpus=Gpus(row["gpus"]), sizes=flux,
        )  # fmt: skip
        assert (row["peak"], row["fits"]) == (plan.peak, plan.fits)
        assert row["seconds_per_update"] == plan.seconds
        assert row["scaling_efficiency"] == plan.efficiency


def test_the_page_says_what_the_plan_says(capsys):
    """docs/scaling.md has some rows of the table that its command prints."""
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    command = next(
        line for line in page.splitlines() if line.startswith("g2rpo plan") and "8,16" in line
    )
    out = planned(capsys, *command.split()[2:])
    printed, shown = [], []
    for line in out.splitlines():
        if "replicate" in line or "shard" in line or "hybrid" in line:
            printed.append(line.split())
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 8 and cells[1] in ("replicate", "shard", "hybrid"):
            shown.append(" ".join(filter(None, cells[1:])))
    said = [" ".join(line) for line in printed]
    assert len(shown) == 12
    assert all(any(f" {row} " in f" {line} " for line in said) for row in shown), (shown, said)


def test_table_of_one_strategy_and_prompts_rounded_up(capsys):
    config = config_of("digits", "--train.prompts_per_update", 4)
    found = plan_scaling(config, CARDS["l40s"], "digits", [Gpus(3), Gpus(6)])
    assert found.prompts == 2 and found.why.endswith("4 over 3, rounded up")
    assert [plan.work.prompts for plan in found.plans] == [2] * 6
    out = planned(capsys, "digits", "--gpu", "l40s", "--gpus", "1,4", "--strategy", "shard")
    assert "shard" in out and "replicate" not in out and "one process" in out
    tight = planned(capsys, "flux-dev-paper", "--gpu", "24GB", "--gpus", "16,32", code=1)
    assert " no " in tight and " yes " not in tight
    streamed = ["--optimizer.name", "adamw_streamed", "--distributed.strategy", "replicate"]
    config = config_of("flux-dev-1gpu", "--optimizer.offload", "false", *streamed)
    ways = {p.config.distributed.strategy
            for p in plan_scaling(config, H100, "", [Gpus(8), Gpus(16)]).plans}  # fmt: skip
    assert ways == {"replicate"}  # which no shard could be stepped by


HAVE = ["flux-dev-8gpu", "--gpu", "h100-80gb"]
MISTAKES = {
    "none": ([*HAVE, "--gpus", "0"], ["--gpus is '0'", "from 1 to 100000"]),
    "too many": ([*HAVE, "--gpus", "8,100001"], ["--gpus is '8,100001'", "8,16,64"]),
    "no number": ([*HAVE, "--gpus", "8,x"], ["--gpus is '8,x'"]),
    "half": ([*HAVE, "--gpus", "1.5"], ["--gpus is '1.5'"]),
    "empty": ([*HAVE, "--gpus", "8,"], ["--gpus is '8,'"]),
    "no value": ([*HAVE, "--gpus"], ["--gpus has no value"]),
    "node": ([*HAVE, "--gpus", "8", "--per-node", "-8"], ["--per-node is '-8'"]),
    "network": ([*HAVE, "--gpus", "8", "--network", "0"], ["--network is '0'", "GB/s"]),
    "price": ([*HAVE, "--gpus", "8", "--price", "nan"], ["--price is 'nan'", "dollars"]),
    "prompts": (
        [*HAVE, "--gpus", "3"], ["train.prompts_per_update is 16", "multiple of 3", "--gpus"],
    ),
    "nodes": (
        [*HAVE, "--gpus", "16", "--per-node", "5", "--strategy", "hybrid"],
        ["--gpus is 16", "'hybrid'", "multiple of --per-node 5"],
    ),
    "optimizer": (
        [*HAVE, "--gpus", "8", "--optimizer.name", "bitsandbytes"],
        ["optimizer.name is 'bitsandbytes'", "'shard'", "'adamw8bit'"],
    ),
    "FP8 in every forward": (
        [*HAVE, "--gpus", "8", "--distributed.gather", "forward"],
        ["rollout.precision is 'fp8'", "distributed.gather"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_input(case, capsys):
    arguments, said = MISTAKES[case]
    assert cli.main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in said), error


def test_strategy_must_be_one(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *HAVE, "--gpus", "8", "--strategy", "split"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "distributed.strategy" in error and "split" in error and "hybrid" in error
