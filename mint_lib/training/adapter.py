"""The adapter: the few weights that are trained, on top of a student whose own weights stay as they are.

Goes in: a student and a `LoraConfig`. Comes out: the student with a fresh adapter, which changes no answer before it is
trained. It does not know how it is trained.
"""

import logging
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import peft
    import transformers

logger = logging.getLogger(__name__)


class LoraConfig(BaseModel):
    """The low-rank adapter (Hu et al. 2021, arXiv 2106.09685)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    rank: int = Field(default=16, ge=1)
    """Rank of the update of each matrix. MINT's 3B student: 256."""
    alpha: float = Field(default=32.0, gt=0.0)
    """The update is scaled by alpha / rank, or as `scaling` says. MINT's 3B student: 128."""
    scaling: Literal["standard", "rank_stabilised"] = "standard"
    """`rank_stabilised` scales by alpha / sqrt(rank), so that large ranks learn no slower (rsLoRA, Kalajdzievski 2023,
    arXiv 2312.03732). What alpha 128 is at rank 256 in the standard scaling, 0.5, is alpha 8 here."""
    update: Literal["additive", "weight_decomposed"] = "additive"
    """`weight_decomposed` trains each output's magnitude apart from its direction (DoRA, Liu et al. 2024, arXiv
    2402.09353), one more number for each output. Such a student can be evaluated but not served: the server runs many
    adapters in one batch, which PEFT cannot do with DoRA, and refuses it when it is loaded."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the adapter's inputs set to 0 in training. MINT: 0.05."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """`all-linear` (every linear layer but the output layer) or names of modules."""
    last_layers: int | None = Field(default=None, ge=1)
    """Adapt only the last so many decoder layers, so that the backward pass ends there; None adapts all."""


def add_adapter(model: "transformers.PreTrainedModel", lora: LoraConfig) -> "peft.PeftModel":
    """`model` with a fresh adapter; only the adapter's weights are to be trained, and their number is logged.

    Raises:
        InvalidInput: `lora.last_layers` exceeds the student's layers.
    """
    import peft

    num_layers = model.config.num_hidden_layers
    if lora.last_layers is not None and lora.last_layers > num_layers:
        raise InvalidInput(
            f"alignment.lora.last_layers is {lora.last_layers}, but the student has {num_layers} layers. Lower it."
        )
    adapted: peft.PeftModel = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.scaling == "rank_stabilised",
            use_dora=lora.update == "weight_decomposed",
            target_modules=_list_linear_layers(model)
            if lora.target_modules == "all-linear"
            else [*lora.target_modules],
            layers_to_transform=(
                list(range(num_layers - lora.last_layers, num_layers)) if lora.last_layers is not None else None
            ),
        ),
    )
    logger.info("%d of %d parameters are trained", *adapted.get_nb_trainable_parameters())
    return adapted


def _list_linear_layers(model: "transformers.PreTrainedModel") -> list[str]:
    """Names of all linear layers but the output one; PEFT takes no `all-linear` where only some layers are adapted."""
    import torch

    output = model.get_output_embeddings()
    modules = model.named_modules()
    linear = {name for name, module in modules if isinstance(module, torch.nn.Linear) and module is not output}
    return sorted({name.rpartition(".")[2] for name in linear})
