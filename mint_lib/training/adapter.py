"""The adapter: the few weights that are trained, on top of a student whose own weights stay as they are.

Goes in: a student, of text or of images, and a `LoraConfig`. Comes out: the student with a fresh adapter, which changes
no answer before it is trained. An image student has three parts: the vision tower, the projector that carries what the
tower sees into the language model, and the language model. It does not know how it is trained.
"""

import logging
import re
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    import peft
    import torch
    import transformers

logger = logging.getLogger(__name__)


class ImageParts(NamedTuple):
    """Where in a model of one family its parts for images lie."""

    tower: str
    projector: str


IMAGE_PARTS = {
    "idefics3": ImageParts("model.vision_model", "model.connector"),
    "smolvlm": ImageParts("model.vision_model", "model.connector"),
    "llava": ImageParts("model.vision_tower", "model.multi_modal_projector"),
    "mllama": ImageParts("model.vision_model", "model.multi_modal_projector"),
    "qwen2_vl": ImageParts("model.visual", "model.visual.merger"),
    "qwen2_5_vl": ImageParts("model.visual", "model.visual.merger"),
}
"""By the config's `model_type`. The projector is no part of the tower here, also where it lies inside it."""


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
    """`all-linear` (every linear layer of the adapted parts, never the output layer) or names of linear layers."""
    last_layers: int | None = Field(default=None, ge=1)
    """Adapt only the last so many decoder layers, so that the backward pass ends there; None adapts all."""
    towers: Literal["language", "language_and_vision"] = "language"
    """Of an image student, what is adapted: its language model, or its vision tower as well (as MINT's)."""
    projector: Literal["frozen", "trained"] = "frozen"
    """Of an image student: `trained` trains all weights of the projector beside the adapter (as PeFoMed's)."""

    @model_validator(mode="after")
    def _ends_where_it_says(self) -> Self:
        if self.last_layers is not None and (self.projector, self.towers) != ("frozen", "language"):
            raise ValueError(
                f"last_layers {self.last_layers} ends the backward pass above the images, so that projector: "
                f"{self.projector} with towers: {self.towers} cannot be trained; leave last_layers out, or take "
                "projector: frozen and towers: language"
            )
        return self


def add_adapter(model: "transformers.PreTrainedModel", lora: LoraConfig) -> "peft.PeftModel":
    """`model` with a fresh adapter; only what `lora` names is to be trained, and the number of weights is logged.

    Raises:
        InvalidInput: `lora.last_layers` exceeds the student's layers; a name of `lora.target_modules` is no linear
            layer of the adapted parts; vision is to be trained and the student reads text only, or is of a family
            whose parts are not known.
    """
    import peft

    parts = _find_parts(model, lora)
    adapted: peft.PeftModel = peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type="CAUSAL_LM",  # PEFT has no word for students of images, and treats them alike
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.scaling == "rank_stabilised",
            use_dora=lora.update == "weight_decomposed",
            target_modules=_list_adapted_layers(model, lora, parts),
            modules_to_save=[parts.projector] if parts is not None and lora.projector == "trained" else None,
        ),
    )
    if parts is not None and lora.projector == "trained":
        _compute_in_float32(adapted.base_model.model.get_submodule(parts.projector).modules_to_save["default"])
    logger.info("%d of %d parameters are trained", *adapted.get_nb_trainable_parameters())
    return adapted


def _find_parts(model: "transformers.PreTrainedModel", lora: LoraConfig) -> ImageParts | None:
    """Where the images' parts lie, if `lora` trains any of them."""
    if (lora.projector, lora.towers) == ("frozen", "language"):
        return None
    family = model.config.model_type
    if model.config.get_text_config() is model.config:
        raise InvalidInput(
            f"alignment.lora asks for towers: {lora.towers} and projector: {lora.projector}, and the student "
            f"({family}) reads text only. Take towers: language and projector: frozen, or an image student."
        )
    if family not in IMAGE_PARTS:
        raise InvalidInput(
            f"Where a student of the family {family} has its vision tower and projector is not known; it is of "
            f"{', '.join(IMAGE_PARTS)}. Take towers: language and projector: frozen, or a student of these."
        )
    return IMAGE_PARTS[family]


def _list_adapted_layers(
    model: "transformers.PreTrainedModel", lora: LoraConfig, parts: ImageParts | None
) -> list[str]:
    """Full names of the linear layers that get an adapter; PEFT shortens long lists without changing their meaning."""
    import torch

    num_layers = model.config.get_text_config().num_hidden_layers
    if lora.last_layers is not None and lora.last_layers > num_layers:
        raise InvalidInput(
            f"alignment.lora.last_layers is {lora.last_layers}, but the student has {num_layers} layers. Lower it."
        )
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    decoder = model.get_decoder()
    within = [f"{name}." for name, module in model.named_modules() if module is decoder]
    if parts is not None and lora.towers == "language_and_vision":
        within.append(f"{parts.tower}.")
        linear = [name for name in linear if not f"{name}.".startswith(f"{parts.projector}.")]
    candidates = [name for name in linear if name.startswith(tuple(within))]
    if lora.last_layers is not None:
        first = num_layers - lora.last_layers
        candidates = [name for name in candidates if _layer_number(name.removeprefix(within[0])) >= first]
    if lora.target_modules == "all-linear":
        return candidates
    chosen: set[str] = set()
    for target in lora.target_modules:
        found = {name for name in candidates if f".{name}".endswith(f".{target}")}
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in candidates}))
            raise InvalidInput(
                f"alignment.lora.target_modules names {target}, which is no linear layer of the adapted parts. They "
                f"have {known}."
            )
        chosen |= found
    return sorted(chosen)


def _layer_number(place: str) -> int:
    """The decoder layer that `place`, as seen from the decoder, lies in; -1 for none."""
    number = re.search(r"(?:^|\.)(\d+)\.", place)
    return int(number[1]) if number else -1


def _compute_in_float32(module: "torch.nn.Module") -> None:
    """Keep and compute `module` in float32 whatever is around it, as PEFT does with adapters.

    bfloat16 has 8 significant bits: an update of less than 1/512 of a weight, as those of fine-tuning are, is lost.
    """
    import torch

    around = next(module.parameters()).dtype
    if around == torch.float32:
        return
    module.float()
    # DeepSpeed casts every weight back, so the inputs follow the weights.
    module.register_forward_pre_hook(
        lambda module, inputs: tuple(value.to(next(module.parameters()).dtype) for value in inputs)
    )
    module.register_forward_hook(lambda _, _inputs, output: output.to(around))
