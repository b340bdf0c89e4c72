"""What is trained, and what it is asked to draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import distinct, expect, finite

# The attentions' linears of all of FLUX's blocks, the feed-forwards' of the double ones.
LORA_TARGETS = (
    "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
    "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip


@dataclass
class LoraConfig:
    """Low-rank adapters (PEFT) instead of full fine-tuning."""

    rank: int = 0
    """Rank of the adapters; 0: no adapters, all weights are trained."""
    alpha: float | None = None
    """Their scale times the rank; null: the rank, a scale of 1."""
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    """Linear layers that get one, by the end of their names."""

    def validate(self) -> None:
        expect("model.lora.rank", self.rank, self.rank >= 0, "at least 0")
        alpha = self.alpha
        ok = alpha is None or (alpha > 0 and finite(alpha))
        expect("model.lora.alpha", alpha, ok, "> 0, or null")
        distinct("model.lora.targets", self.targets)


@dataclass
class ModelConfig:
    """What is trained, and where."""

    path: str = "digits"
    """What to train: 'digits', the embedded flow model of handwritten digits; or a FLUX pipeline,
    as a folder or a Hugging Face hub id such as black-forest-labs/FLUX.1-dev."""
    transformer: str | None = None
    """A .safetensors file with all weights of the transformer to start from; null: path's own."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the transformer's weights and arithmetic; null: bfloat16, and float32 for the digits."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    fuse: bool = False
    """Run the transformer's blocks on g2rpo_kernels' fused ops; the same weights and files."""
    attention: Literal[
        "auto", "native", "cudnn", "flash-attn-3", "flash-attn", "flash", "efficient", "math"
    ] = "auto"
    """Attention of FLUX: auto measures those there are, once for each GPU; native leaves it to
    PyTorch, as do CPUs; flash-attn needs that package, cudnn and the last three none."""
    gradient_checkpointing: bool = False
    """Forward twice in the update instead of keeping every activation."""
    device: str = "auto"
    """Torch device, e.g. cpu or cuda:0; 'auto' takes the GPU when there is one."""


@dataclass
class DataConfig:
    """What it is asked to draw."""

    prompts: str | None = None
    """Prompts: a text file, one a line; .jsonl with an object a line; or .csv with a header. null:
    the prompts the model comes with."""
    evaluation_prompts: str | None = None
    """Prompts of the evaluations, in such a file, best of none that is trained on; null: those of
    data.prompts."""
    column: str = "prompt"
    """Key or column that holds the prompt, in .jsonl and .csv files."""
    embeddings: str | None = None
    """Folder that `g2rpo embed` fills and training reads; null: training embeds as it goes."""
    max_sequence_length: int = 512
    """T5 tokens of a prompt, 1 to 512; longer prompts are cut."""

    def validate(self) -> None:
        length = self.max_sequence_length
        expect("data.max_sequence_length", length, 1 <= length <= 512, "1 to 512")
