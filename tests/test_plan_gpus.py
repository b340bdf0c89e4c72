"""The plan of several GPUs: what each holds and sends, against counts of real, small models."""

from __future__ import annotations

import math

import pytest
import torch
from test_fuse_flux import new_flux
from tiny import tiny_config
from torch import nn

from g2rpo.distributed import layout
from g2rpo.errors import ConfigurationError
from g2rpo.optimizers import modulation_linears
from g2rpo.plan import as_json, communication, make_plan, memory
from g2rpo.plan.cards import CARDS, Card
from g2rpo.plan.communication import Group, completion_batches, groups_of, traffic_of
from g2rpo.plan.gpus import Gpus, share_of
from g2rpo.plan.memory import trained
from g2rpo.plan.model import transformer_sizes
from g2rpo.plan.speed import plan_work
from g2rpo.plan.switches import decided

H100 = CARDS["h100-80gb"]
POSITIONS = [0, 1, 3]  # the anchor goes on to position 3: 4 forwards


@pytest.fixture(scope="module")
def model():
    return nn.Module.to(new_flux(), torch.bfloat16)


@pytest.fixture(scope="module")
def sizes(model):
    return transformer_sizes(model, "test", 16, 5)


def config_of(strategy="shard", optimizer="adamw8bit", prompts=24, **distributed):
    """Of FLUX's kind, in bfloat16; 24 prompts an update at three positions, 4 steps' schedule."""
    config = tiny_config(steps=5, sde_positions=POSITIONS, group_size=4, branch_batch=8)
    config.model.path, config.model.dtype = "black-forest-labs/FLUX.1-dev", "bfloat16"
    config.optimizer.name, config.train.prompts_per_update = optimizer, prompts
    config.distributed.strategy = strategy
    for key, value in distributed.items():
        setattr(config.distributed, key, value)
    return config


def parts_of(model):
    """Parameters of the largest two blocks and of what is in none."""
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    counts = sorted((count(block) for block in blocks), reverse=True)
    return counts[0], counts[1], count(model) - sum(counts)


def count(module):
    return sum(p.numel() for p in module.parameters())


def rows_of(config, sizes, gpus):
    own, found = decided(share_of(config, gpus), sizes, H100, gpus)
    return {row.name: row.bytes for row in found.rows}, own


# What a rank holds -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_shard_is_a_part_of_everything(model, sizes, ranks):
    config, n = config_of(), count(model)
    rows, _ = rows_of(config, sizes, Gpus(ranks))
    assert rows["weights"]["load"] == 2 * n  # read whole, and cut
    assert rows["weights"]["anchor"] == math.ceil(2 * n / ranks)
    assert rows["low bits of the master"]["step"] == math.ceil(n / ranks)  # 24 bits of 16
    assert rows["optimizer's moments"]["step"] == pytest.approx(2.03125 * n / ranks, rel=1e-3)
    assert rows["gradients"]["step"] == math.ceil(2 * n / ranks)
    assert rows["gradients"]["backward"] == 4 * n  # float32, whole, until they are reduced
    assert "gradient factors" not in rows and "reduction's bucket" not in rows
    config.distributed.gradients = "sharded"
    rows, _ = rows_of(config, sizes, Gpus(ranks))
    assert rows["gradients"]["backward"] == rows["gradients"]["step"] == math.ceil(2 * n / ranks)


def test_blocks_in_flight(model, sizes):
    """Two blocks of weights and what is of none; of gradients one block's, reduced in float32."""
    first, second, rest = parts_of(model)
    rows, _ = rows_of(config_of(gather="phase"), sizes, Gpus(4))
    flight = rows["blocks in flight"]
    assert flight["anchor"] == 2 * (first + second + rest)
    assert flight["completions"] == flight["rewards"] == 2 * rest
    assert flight["backward"] == flight["anchor"] + (4 + 2) * first
    assert "step" not in flight
    rows, _ = rows_of(config_of(gather="forward"), sizes, Gpus(4))
    assert rows["blocks in flight"]["completions"] == 2 * (first + second + rest)
    assert "whole copy" not in rows
    whole = config_of()
    whole.model.dtype = "float32"  # whose gradients are what is reduced: no second dtype
    rows, _ = rows_of(whole, sizes, Gpus(4))
    assert rows["blocks in flight"]["backward"] == 4 * (first + second + rest) + 4 * first


def test_a_gradient_that_is_reduced_at_once_is_never_whole(model, sizes):
    config = config_of()
    config.objective.stepping = "per_position"  # one backward a step
    rows, _ = rows_of(config, sizes, Gpus(4))
    assert rows["gradients"]["backward"] == rows["gradients"]["step"]
    config.rollout.branch_batch = 2  # of a rank's 6 prompts: three a step
    rows, _ = rows_of(config, sizes, Gpus(4))
    assert rows["gradients"]["backward"] == 4 * count(model)


def test_the_copy_that_completes(model, sizes):
    config, n = config_of(), count(model)
    linears = [
        module.weight.numel()
        for block in (*model.transformer_blocks, *model.single_transformer_blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and "norm" not in name
    ]
    modulations = sum(linear.weight.numel() for linear in modulation_linears(model))
    rows, own = rows_of(config, sizes, Gpus(4))
    assert own.distributed.gather == "phase" and config.distributed.gather == "auto"
    assert rows["whole copy"]["completions"] == 2 * n  # not fused: all of it stays
    config.model.fuse, config.rollout.precision = True, "fp8"
    rows, _ = rows_of(config, sizes, Gpus(4))
    assert rows["FP8 weights"]["completions"] == sizes.fp8_bytes
    kept = 2 * (n - sum(linears) - modulations)
    of_a_block = max(
        sum(each.inputs * each.outputs for each in block)
        for block in (sizes.double_linears, sizes.single_linears)
    )
    visiting = 2 * (modulations + of_a_block) - rows["activations"]["completions"]
    assert rows["whole copy"]["completions"] == kept + max(0, visiting)
    config.model.dtype, config.rollout.precision = "float32", "bfloat16"
    config.model.fuse = False
    rows, _ = rows_of(config, sizes, Gpus(4))
    assert rows["whole copy"] == {"completions": 2 * n} and "bfloat16 copy" not in rows


def test_a_replica_holds_all_and_everyones_factors(model, sizes):
    config, n = config_of("replicate"), count(model)
    linears = modulation_linears(model)
    modulations = sum(linear.weight.numel() for linear in linears)
    features = sum(linear.in_features + linear.out_features for linear in linears)
    config.train.prompts_per_update = 8  # one a rank, three rows of each
    rows, _ = rows_of(config, sizes, Gpus(8))
    assert rows["weights"]["anchor"] == rows["weights"]["load"] == 2 * n
    assert rows["gradients"]["backward"] == 2 * (n - modulations)
    assert rows["gradient factors"]["backward"] == 2 * 3 * features
    assert rows["gradient factors"]["step"] == 8 * 2 * 3 * features
    # One bucket, and its pieces in float32 beside it: all parameters are fewer than a bucket's.
    assert memory.BUCKET is layout.BUCKET and 4 * layout.BUCKET == 64 * 2**20
    assert rows["reduction's bucket"]["step"] == 2 * 4 * min(n, layout.BUCKET)
    alone = trained(share_of(config, Gpus(8)), sizes)
    assert alone.factors == alone.all_factors == 2 * 3 * features


def test_hybrid_holds_a_nodes_part(sizes):
    config = config_of("hybrid")
    within, _ = rows_of(config, sizes, Gpus(8, per_node=4))
    node, _ = rows_of(config_of("shard", prompts=12), sizes, Gpus(4))
    assert within["weights"] == node["weights"] and within["gradients"] == node["gradients"]


# What it sends -----------------------------------------------------------------------------------


def sent(config, sizes, gpus):
    own, _ = decided(share_of(config, gpus), sizes, H100, gpus)
    return {each.name: each for each in traffic_of(own, sizes, H100, gpus)}, own


@pytest.mark.parametrize("gather", ["phase", "forward"])
@pytest.mark.parametrize("gradients", ["whole", "sharded"])
def test_what_a_shard_sends(model, sizes, gather, gradients):
    """6 prompts a rank in forwards of 4: two chunks, four anchor steps, three positions."""
    config, n = config_of(gather=gather, gradients=gradients), count(model)
    config.rollout.branch_batch = 4
    found, own = sent(config, sizes, Gpus(4))
    each = 2 * n * 3 / 4  # of bfloat16 weights, what three others have
    batches = completion_batches(own)
    assert batches >= 6 * 4 * 3 / 4 and gather in ("phase", "forward")
    times = {
        "weights gathered, anchor": 2 * 4,
        "weights gathered, completions": 1 if gather == "phase" else batches,
        "weights gathered, update": 2 * 3 * 2,
    }
    for name, expected in times.items():
        assert (found[name].times, found[name].bytes) == (expected, expected * each)
    reduced = found.pop("gradients reduced")
    assert reduced.times == (1 if gradients == "whole" else 6)
    assert reduced.bytes == reduced.times * 4 * n * 3 / 4
    assert found.keys() == times.keys()
    own.objective.kl = 0.1  # the starting policy's forwards gather too
    again = {t.name: t.times for t in traffic_of(own, sizes, H100, Gpus(4))}
    assert again["weights gathered, update"] == 3 * 3 * 2


def test_what_a_replica_sends(model, sizes):
    linears, n = modulation_linears(model), count(model)
    dense = n - sum(linear.weight.numel() for linear in linears)
    features = sum(linear.in_features + linear.out_features for linear in linears)
    found, _ = sent(config_of("replicate", prompts=4), sizes, Gpus(4))
    assert found["gradients summed"].bytes == 2 * 4 * dense * 3 / 4
    assert found["gradient factors gathered"].bytes == 3 * (3 * features * 2)  # three others' rows
    found, _ = sent(config_of("replicate", "adamw"), sizes, Gpus(4))
    assert {name: t.bytes for name, t in found.items()} == {"gradients summed": 2 * 4 * n * 3 / 4}


def test_hybrid_sums_parts_over_nodes(model, sizes):
    gpus = Gpus(12, per_node=4)
    found, own = sent(config_of("hybrid"), sizes, gpus)
    part = math.ceil(4 * count(model) / 4)
    over = found["gradients summed over nodes"]
    assert over.bytes == 2 * part * 2 / 3 and "network" in over.basis
    assert over.seconds == pytest.approx(over.bytes / (0.8 * 50e9))
    assert found["gradients reduced"].bytes == 4 * count(model) * 3 / 4  # in the node
    assert groups_of(own, Gpus(4, per_node=4)) == (Group(4, 1, 1), None)


def test_the_slower_link_counts():
    """1 TB over two nodes of four: NVLink brings 7/8 to a GPU, four adapters 1/2 to a node."""
    group = Group(8, 2, 4)
    fast = group.traffic("", 10**12, 1, H100, network=1e12)
    assert fast.seconds == pytest.approx(0.875e12 / (0.8 * 450e9)) and "NVLink" in fast.basis
    slow = group.traffic("", 10**12, 1, H100, network=10e9)
    assert slow.seconds == pytest.approx(0.5e12 / 4 / (0.8 * 10e9)) and "4 x 10" in slow.basis
    summed = group.traffic("", 10**12, 3, H100, network=10e9, sum_kept=True)
    assert (summed.bytes, summed.seconds) == (6 * slow.bytes, pytest.approx(6 * slow.seconds))
    pcie = Group(2, 1, 1).traffic("", 10**12, 1, CARDS["l40s"], network=1e12)
    assert pcie.seconds == pytest.approx(0.5e12 / (0.7 * 32e9)) and "PCIe" in pcie.basis
    assert group.traffic("", 10**12, 1, Card("80GB", 80 * 2**30), network=1e12).seconds is None


# Together ----------------------------------------------------------------------------------------


def test_seconds_efficiency_and_hours(sizes, monkeypatch):
    monkeypatch.setattr("g2rpo.plan.speed.SMALL", 0)  # so that the tiny model has rates
    config, gpus = config_of(), Gpus(4)
    plan = make_plan(config, H100, gpus=gpus, sizes=sizes)
    alone = plan_work(plan.config, sizes, H100, gpus=gpus)
    assert plan.work.seconds == alone.seconds
    seconds = sum(each.seconds for each in plan.traffic)
    assert plan.communication == seconds and plan.seconds == alone.seconds + seconds
    assert plan.efficiency == alone.seconds / (alone.seconds + seconds)
    gathered = 2 * sizes.parameters * 3 / 4 / (0.8 * 450e9)
    images = math.ceil(config.train.evaluation_samples / 4)
    assert plan.config.train.evaluation_samples == images
    batches = math.ceil(images / 8)
    evaluation = alone.evaluation.seconds + 5 * batches * gathered
    of_one = alone.updates * plan.seconds + alone.evaluations_of_policy * evaluation
    assert plan.hours == pytest.approx(4 * of_one / 3600)
    shown = as_json(plan, 2.0)
    assert shown["work"]["cost"] == pytest.approx(2 * plan.hours)
    assert shown["gpus"]["source"] == "estimated" and "nothing" in shown["gpus"]["hidden"]
    assert communication.evaluation_seconds(config, sizes, H100, Gpus(1)) == 0


REFUSED = {
    "prompts": (config_of(prompts=9), Gpus(4), ["train.prompts_per_update is 9", "multiple of 4"]),
    "nodes": (config_of("hybrid"), Gpus(12), ["--gpus is 12", "'hybrid'", "--per-node 8"]),
    "optimizer": (
        config_of("shard", "adamw_streamed"), Gpus(4), ["'adamw_streamed'", "'adamw' or 'adamw8b"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_spread(case):
    config, gpus, said = REFUSED[case]
    with pytest.raises(ConfigurationError) as error:
        share_of(config, gpus)
    assert all(text in str(error.value) for text in said), error.value
