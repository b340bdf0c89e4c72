"""What of a trainer a checkpoint keeps, the weights and their average apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .trainer import Trainer

# Attributes of the trainer that a checkpoint keeps as they are.
STATE = (
    "updates", "evaluations", "skipped_updates", "skipped_in_a_row", "seconds", "row",
)  # fmt: skip
BATCHES = {"branch_batch": "branch_batch", "anchor_batch": "update_batch"}  # and of its sampling


def collect(trainer: Trainer) -> dict[str, Any]:
    """All that an undisturbed run would go on with."""
    state = {
        "optimizer": trainer.improver.optimizer.state_dict(),
        "prompts": trainer.sampler.prompts,
        "evaluation_prompts": trainer.evaluation_prompts,
        **{name: getattr(trainer, name) for name in STATE},
        **{key: getattr(trainer.sampling, name) for key, name in BATCHES.items()},
    }
    if hasattr(trainer.model, "state_dict"):
        state["model"] = trainer.model.state_dict()
    return state


def check(trainer: Trainer, state: dict[str, Any]) -> None:
    """Raise ConfigurationError where it is of other prompts."""
    data = trainer.config.data
    if state["prompts"] != trainer.sampler.prompts:
        raise ConfigurationError(
            f"data.prompts is {data.prompts!r}, which holds {len(trainer.sampler.prompts)} "
            f"prompts; expected the {len(state['prompts'])} that the run was started with, in "
            "their order"
        )
    # Older ones lack it.
    if state.get("evaluation_prompts", trainer.evaluation_prompts) != trainer.evaluation_prompts:
        raise ConfigurationError(
            f"data.evaluation_prompts is {data.evaluation_prompts!r}, whose prompts are others "
            "than those that the run was started with; expected the same, in their order"
        )


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Counterpart of `collect`."""
    trainer.improver.optimizer.load_state_dict(state["optimizer"])
    for name in STATE:
        setattr(trainer, name, state[name])
    # Smaller where memory ran out; and among more ranks than before fewer rows.
    for key, name in BATCHES.items():
        setattr(trainer.sampling, name, min(state[key], getattr(trainer.sampling, name)))
    if hasattr(trainer.model, "load_state_dict"):
        trainer.model.load_state_dict(state["model"])
