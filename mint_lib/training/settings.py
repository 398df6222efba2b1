"""Every setting of the alignment stage."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.records import Name
from mint_lib.student import StudentConfig
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.deepspeed import DeepspeedConfig


class AlignmentConfig(BaseModel):
    """How the student is trained."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: Name
    """Name of the student version in the store."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of the adapter's start, the order of the data and dropout."""
    student: StudentConfig
    method: str = "orpo"
    """File of `mint_lib/alignment_methods`."""
    method_config: dict[str, Any] = {}
    """Settings of the method; see its `Config`."""
    tuning: Literal["adapter", "full"] = "adapter"
    """What is trained: a low-rank adapter, or all weights of the student."""
    lora: LoraConfig = LoraConfig()
    quantisation: Literal["none", "nf4"] = "none"
    """`nf4` holds the base in 4 bits while it is trained (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). Validation
    sees that base; the adapter is evaluated and served on the base's own weights."""
    frozen_layers: Literal["recompute", "cache"] = "recompute"
    """`cache` computes the layers below the adapted ones once per training row instead of once per epoch; needs
    `lora.last_layers`, and memory for tokens x hidden size x 4 bytes (SmolLM2-135M: 2.3 KB a token)."""
    learning_rate: float = Field(default=5e-5, gt=0.0)
    """Peak learning rate of AdamW. MINT's released run: 5e-5 at rank 256; small ranks want about 1e-3."""
    warmup_share: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the steps in which the rate rises; it then falls along a cosine to 0. MINT: 0.1."""
    epochs: int = Field(default=3, ge=1)
    """Passes over the training pairs. MINT's 26 over-fitted."""
    trees_per_batch: int = Field(default=8, ge=1)
    """Prompts of one optimiser step over all workers, each with all its pairs; pairs, for methods without trees."""
    batch_tokens: int = Field(default=4096, ge=16)
    """Most places, padding included, of one forward and backward pass of a method on prompt trees. A step's trees are
    dealt out to the workers and split by length into such passes, so this bounds the memory and changes no number. A
    longer tree is a pass by itself."""
    accumulation_steps: int = Field(default=1, ge=1)
    """Passes that one optimiser step of `dpo` and `sft` is split into, which count pairs and not tokens."""
    activations: Literal["keep", "recompute"] = "keep"
    """`recompute` keeps only each layer's input for the backward pass: far less memory, about a third more time."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """`flex` (FlexAttention, for CUDA) skips what a tree's mask hides and puts all trees of a pass into one row,
    without padding; `sdpa` runs anywhere. `auto`: flex with accelerators, prompt trees and text, else sdpa."""
    max_gradient_norm: float = Field(default=1.0, gt=0.0)
    """Gradients are scaled down to this norm. MINT: 0.3."""
    weight_decay: float = Field(default=0.0, ge=0.0)
    """AdamW's weight decay."""
    validate_every_steps: int = Field(default=50, ge=1)
    """Optimiser steps between two validations; there is one at the end as well."""
    validation_cases: int = Field(default=32, ge=1)
    """Validation cases whose pairs and label ranking are measured each time, drawn by the seed."""
    keep_best: Literal["agreement_mrr", "agreement_top_1", "reward_margin", "reward_accuracy", "loss"] = "agreement_mrr"
    """Validation figure that decides which adapter is kept. Agreement is that of the student's exact label ranking with
    the teacher's first label; loss is the chosen answers' negative log-probability per token."""
    early_stop_patience: int = Field(default=5, ge=1)
    """Stop after so many validations without a better figure."""
    on_not_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is not a number does: the run ends with the ids of the step's cases, or the step is
    left out and counted. More than five in a row end the run either way."""
    num_workers: int = Field(default=1, ge=1)
    """Training processes."""
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic: start, and go on after a loss, with fewer workers, at least these, if there is no room for all. The
    order of the data and the gradients are those of any other number of workers. None: always `num_workers`."""
    cpus_per_worker: int = Field(default=2, ge=1)
    """CPU cores, and so threads, of each."""
    use_gpu: bool = False
    """One accelerator for each worker."""
    deepspeed: DeepspeedConfig | None = None
    """Shards optimiser, gradients and weights over the workers with DeepSpeed; None trains without it."""
    max_failures: int = Field(default=2, ge=0)
    """How often dead workers are replaced; training goes on from the last checkpoint."""
    checkpoint_every_steps: int = Field(default=100, ge=1)
    """Optimiser steps between two checkpoints to the store."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.frozen_layers == "cache" and self.lora.last_layers is None:
            raise ValueError("frozen_layers: cache needs lora.last_layers, as only layers below the adapted are frozen")
        if self.frozen_layers == "cache" and self.student.reads == "image":
            raise ValueError("frozen_layers: cache is for text students: it does not know which image a row belongs to")
        if self.tuning == "full" and (self.quantisation != "none" or self.frozen_layers == "cache"):
            raise ValueError("tuning: full trains every weight: quantisation and frozen_layers: cache are for adapters")
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        if self.deepspeed is not None and self.quantisation != "none" and self.deepspeed.stage == 3:
            raise ValueError("deepspeed stage 3 cannot shard weights of 4 bits: use stage 2, or quantisation: none")
        if self.deepspeed is not None and self.min_workers not in (None, self.num_workers):
            raise ValueError("deepspeed's checkpoints are for one number of workers: leave min_workers out")
        if self.deepspeed is not None and self.on_not_finite == "skip":
            raise ValueError("deepspeed takes a step before it can be looked at: use on_not_finite: stop")
        if self.attention == "flex" and not self.use_gpu:
            raise ValueError("attention: flex has no backward pass on CPUs: use auto or sdpa")
        if self.attention == "flex" and self.student.reads == "image":
            raise ValueError("attention: flex is for text students: use auto or sdpa")
        return self
