"""The adapter: the few weights that are trained, on top of a student whose own weights stay as they are.

Goes in: a student and a `LoraConfig`. Comes out: the student with a fresh adapter. It does not know how it is trained.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import torch
    import transformers


class LoraConfig(BaseModel):
    """The low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: int = Field(default=16, ge=1)
    """Rank of the update of each matrix. MINT's 3B student: 256."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha / rank. MINT's 3B student: 128."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs set to 0 in training. MINT: 0.05."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output layer) or names of modules."""
    last_layers: int | None = Field(default=None, ge=1)
    """Adapt only the last so many decoder layers, so that the backward pass ends there; None adapts all."""


def add_adapter(model: "transformers.PreTrainedModel", lora: LoraConfig) -> "torch.nn.Module":
    """`model` with a fresh adapter; only the adapter's weights are to be trained.

    Raises:
        InvalidInput: `lora.last_layers` exceeds the student's layers.
    """
    import peft

    num_layers = model.config.num_hidden_layers
    if lora.last_layers is not None and lora.last_layers > num_layers:
        raise InvalidInput(
            f"alignment.lora.last_layers is {lora.last_layers}, but the student has {num_layers} layers. Lower it."
        )
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=_list_linear_layers(model)
            if lora.target_modules == "all-linear"
            else [*lora.target_modules],
            layers_to_transform=(
                list(range(num_layers - lora.last_layers, num_layers)) if lora.last_layers is not None else None
            ),
        ),
    )


def _list_linear_layers(model: "transformers.PreTrainedModel") -> list[str]:
    """Names of all linear layers but the output one; PEFT takes no `all-linear` where only some layers are adapted."""
    import torch

    output = model.get_output_embeddings()
    modules = model.named_modules()
    linear = {name for name, module in modules if isinstance(module, torch.nn.Linear) and module is not output}
    return sorted({name.rpartition(".")[2] for name in linear})
