"""What of a run of alignment decides its memory and time, and which weights it trains.

Goes in: values of a recipe, lengths of its prompt trees, and the student's `Architecture`. It computes no bytes.

A place is a position of a row, padding included; a pass is one forward and backward pass of one worker.
"""

import dataclasses
from typing import Literal, NamedTuple

from mint_lib.training.adapter import LoraConfig
from mint_lib.training.architecture import Architecture, LinearLayer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What of a run decides its memory and time."""

    tuning: Literal["adapter", "full"] = "adapter"
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    quantisation: Literal["none", "nf4"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    activations: Literal["keep", "recompute"] = "keep"
    attention: Literal["sdpa", "flex"] = "sdpa"
    device: Literal["cpu", "cuda"] = "cuda"
    batch_tokens: int
    """Most places of a pass."""
    row_tokens: int
    """Places of the longest tree: such a tree is a pass even where it exceeds `batch_tokens`."""
    mean_row_tokens: float
    """Places of a tree on average."""
    edge_share: float = 1.0
    """Predicted tokens for each place: 1 where the prompt's likelihood counts, else the answers' share."""
    trees_per_batch: int = 1
    num_workers: int = 1
    images_per_tree: int = 0
    deepspeed_stage: Literal[2, 3] | None = None
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    bucket_elements: int = 500_000_000
    """DeepSpeed's `reduce_bucket_size`; the number is its own default."""
    cached_tokens: int = 0
    """Places of the training set whose frozen layers' output is kept."""

    @property
    def num_places(self) -> int:
        """Most places of a pass."""
        return max(self.batch_tokens, self.row_tokens)

    @property
    def width(self) -> int:
        """Bytes of a number in the matrix products."""
        return 2 if self.dtype == "bfloat16" else 4

    @property
    def is_mixed(self) -> bool:
        """Whether float32 weights are computed in bfloat16, by autocast; DeepSpeed casts the weights themselves."""
        return self.dtype == "bfloat16" and self.deepspeed_stage is None

    @property
    def trains_vision(self) -> bool:
        """Whether an adapter reaches below the decoder."""
        return (self.lora.projector, self.lora.towers) != ("frozen", "language")


class TrainedParts(NamedTuple):
    """What is trained."""

    adapted: tuple[LinearLayer, ...]
    num_parameters: int
    first_layer: int
    """The first decoder layer that the backward pass reaches."""


def count_trained(student: Architecture, setting: Setting) -> TrainedParts:
    """The linear layers with an adapter (none in full tuning) and the number of trained parameters.

    An adapter has rank x (inputs + outputs) of each layer, and with weight decomposition one more for each output.
    """
    lora = setting.lora
    if setting.tuning == "full":
        return TrainedParts((), student.num_parameters, 0)
    parts = {"language", "vision"} if lora.towers == "language_and_vision" else {"language"}
    first = max(0, student.num_layers - (lora.last_layers or student.num_layers))
    adapted = tuple(
        layer
        for layer in student.linear_layers
        if layer.part in parts
        and (layer.layer is None or layer.layer >= first)
        and (lora.target_modules == "all-linear" or layer.name in lora.target_modules)
    )
    number = sum(lora.rank * (layer.num_inputs + layer.num_outputs) for layer in adapted)
    if lora.update == "weight_decomposed":
        number += sum(layer.num_outputs for layer in adapted)
    if lora.projector == "trained":
        number += student.num_projector_parameters
    # Recomputing, transformers lets the embeddings require gradients, so that the backward pass goes all the way down.
    reaches_down = setting.activations == "recompute" or setting.trains_vision
    return TrainedParts(adapted, number, 0 if reaches_down else first)
