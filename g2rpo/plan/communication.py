"""What the GPUs of a run send one another in an update, and for how long: all of it estimated.

Bytes are those of rings: of W bytes in all, a rank of n sends and receives W (n - 1) / n when they
are gathered or reduced to parts, and twice as many when they are reduced and all keep the sum.
Seconds are those of the slower link: of the node, through which all of that passes, or of the
network, through which what a node does not have enters it once, over the adapters of all its GPUs.
Scores, metrics and evaluations' images are kilobytes and are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..completions import plan_completions
from ..config import Config
from ..schedule import noise_schedule
from .cards import Card
from .gpus import Gpus
from .model import Sizes
from .speed import LINK_SHARE
from .states import backwards, chunks, loose_gradients, steps, trained

COLLECTIVE_SHARE = 0.8  # of NVLink's published rate, and of the network's, in a collective: assumed


@dataclass(frozen=True)
class Traffic:
    """One kind of an update's traffic: how often, bytes that a rank sends and receives in all,
    seconds and what they rest on; None: the rates are unknown."""

    name: str
    times: int
    bytes: float
    seconds: float | None
    basis: str


@dataclass(frozen=True)
class Group:
    """Ranks that gather and reduce together. lanes: GPUs of a node, each with an adapter, through
    which they reach the other nodes."""

    ranks: int
    nodes: int
    lanes: int

    def traffic(
        self, name: str, whole: int, times: int, card: Card, network: float, sum_kept: bool = False
    ) -> Traffic:
        """Of `whole` bytes, gathered or reduced to parts; sum_kept: reduced, and all keep it."""
        each = (2 if sum_kept else 1) * times * whole
        sent = each * (self.ranks - 1) / self.ranks
        across = each * (self.nodes - 1) / self.nodes / self.lanes
        within, rate = _node_link(card)
        seconds, basis = None, f"no rates are known of {card.name}"
        if self.ranks == self.nodes:  # one of each node
            within, rate = "", network
        if rate:
            by_node = sent / rate if within else 0.0
            by_network = across / (COLLECTIVE_SHARE * network)
            seconds, basis = max(by_node, by_network), within
            if by_network >= by_node and self.nodes > 1:
                basis = (
                    f"assumed: {COLLECTIVE_SHARE:.0%} of the network's {self.lanes} x "
                    f"{network / 1e9:g} GB/s a node"
                )
        return Traffic(name, times, sent, seconds, basis)


def _node_link(card: Card) -> tuple[str, float]:
    """Basis and bytes a second of the link within a node; 0: unknown."""
    if card.nvlink:
        share, link, name = COLLECTIVE_SHARE, card.nvlink, "NVLink's"
    else:
        share, link, name = LINK_SHARE, card.link, "PCIe's"
    return f"assumed: {share:.0%} of {name} {link / 1e9:.0f} GB/s", share * link


def groups_of(config: Config, gpus: Gpus) -> tuple[Group, Group | None]:
    """Who gathers weights and reduces gradients together, and with hybrid the replicas of a part,
    one in each node."""
    if config.distributed.strategy == "hybrid":
        within = Group(min(gpus.count, gpus.per_node), 1, 1)
        return within, Group(gpus.nodes, gpus.nodes, 1) if gpus.nodes > 1 else None
    return Group(gpus.count, gpus.nodes, max(1, gpus.count // gpus.nodes)), None


def traffic_of(config: Config, sizes: Sizes, card: Card, gpus: Gpus) -> tuple[Traffic, ...]:
    """All of an update's. config: a rank's part, distributed.gather decided."""
    whole = trained(config, sizes)  # of everything, as one GPU has it
    group, replicas = groups_of(config, gpus)

    def traffic(name: str, count: int, times: int, sum_kept: bool = False) -> Traffic:
        return group.traffic(name, count, times, card, gpus.network, sum_kept)

    if not gpus.sharded(config):
        item = 4 if config.model.lora.rank else whole.weights // sizes.parameters
        dense, count = 4 * (whole.gradients // item), gpus.count * whole.factors
        folded = count >= sizes.modulation * item  # all ranks' rows would be no smaller
        if whole.factors and folded:
            dense += 4 * sizes.modulation
        found = [traffic("gradients summed", dense, steps(config), sum_kept=True)]
        if whole.factors and not folded:
            found.append(traffic("gradient factors gathered", count, steps(config)))
        return tuple(found)
    anchors = chunks(config) * (max(config.rollout.sde_positions) + 1)
    forwards = 1 if config.distributed.gather == "phase" else completion_batches(config)
    passes = backwards(config) * (3 if config.objective.kl else 2)
    reduced = backwards(config) if loose_gradients(config) else steps(config)
    found = [
        traffic("weights gathered, anchor", whole.weights, anchors),
        traffic("weights gathered, completions", whole.weights, forwards),
        traffic("weights gathered, update", whole.weights, passes),
        traffic("gradients reduced", 4 * whole.count, reduced),
    ]
    if replicas is not None:
        part = -(-4 * whole.count // gpus.parts(config))
        found.append(replicas.traffic(
            "gradients summed over nodes", part, reduced, card, gpus.network, sum_kept=True
        ))  # fmt: skip
    return tuple(found)


def evaluation_seconds(
    config: Config, sizes: Sizes, card: Card, gpus: Gpus
) -> float | None:
    """Of an evaluation of the policy: every forward of sharded weights gathers them."""
    if not gpus.sharded(config):
        return 0.0
    batches = -(-config.train.evaluation_samples // config.rollout.branch_batch)
    group, _ = groups_of(config, gpus)
    whole = trained(config, sizes).weights
    return group.traffic("", whole, batches * config.rollout.steps, card, gpus.network).seconds


def completion_batches(config: Config) -> int:
    """Forwards that complete the branches of a rank."""
    rollout = config.rollout
    return len(plan_completions(
        noise_schedule(rollout.steps, rollout.shift), sorted(rollout.sde_positions),
        rollout.granularities, config.train.prompts_per_update, rollout.group_size,
        rollout.branch_batch,
    ).batches)  # fmt: skip
