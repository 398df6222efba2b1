"""DeepSpeed: optimiser state, gradients and, if wanted, weights spread over all workers (Rajbhandari et al. 2020).

Goes in: a `DeepspeedConfig` as a recipe holds it. Comes out: the dictionary that `transformers.TrainingArguments` takes
as `deepspeed`, found to be one that DeepSpeed itself understands. Values that follow from the rest of the recipe are
`auto`, which transformers fills in. It starts nothing.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mint_lib.errors import InvalidInput


class DeepspeedConfig(BaseModel):
    """How a training is spread over its workers by ZeRO (arXiv 1910.02054)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    stage: Literal[2, 3]
    """2 spreads gradients and optimiser state, which is nearly all there is to spread with an adapter; 3 the weights
    too, which one worker's memory then need not hold."""
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = "none"
    """What lies in the machine's memory instead of the accelerator's, for less of the one and slower steps. Parameters
    can be offloaded at stage 3 only."""
    settings: dict[str, Any] = Field(default={})
    """Further keys of DeepSpeed's own configuration, for instance `zero_optimization: {overlap_comm: true}`. A key that
    DeepSpeed does not know, or that follows from the recipe, is refused."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.offload == "optimizer_and_parameters" and self.stage != 3:
            raise ValueError(
                f"offload: {self.offload} needs stage: 3; at stage {self.stage} every worker holds all parameters. "
                "Take offload: optimizer, or stage: 3"
            )
        ours = _describe(self, use_gpu=False, dtype="float32")
        if taken := sorted(_list_overlaps(ours, self.settings)):
            raise ValueError(
                f"settings sets {', '.join(taken)}, which follows from stage, offload and the rest of the recipe. "
                "Leave it out of settings"
            )
        return self


def render_deepspeed(
    config: DeepspeedConfig, *, use_gpu: bool, dtype: Literal["float32", "bfloat16"]
) -> dict[str, Any]:
    """DeepSpeed's own configuration; `dtype` is the student's. bfloat16 is computed in on accelerators only."""
    return copy.deepcopy(_merge(_describe(config, use_gpu=use_gpu, dtype=dtype), config.settings))


def check_deepspeed(config: DeepspeedConfig) -> None:
    """Let DeepSpeed read its configuration, before anything is started. Imports DeepSpeed, which takes seconds.

    Raises:
        InvalidInput: it does not know a key, or does not take a value.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    rendered = render_deepspeed(config, use_gpu=False, dtype="float32")
    filled = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    read = _ReadKeys(rendered | filled | {"gradient_clipping": 1.0})
    try:
        _drop_auto(read)
        DeepSpeedConfig(read)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise InvalidInput(f"alignment.deepspeed.settings is not what DeepSpeed takes: {wrong}. Correct it.") from None
    except (AssertionError, ValueError, TypeError, AttributeError, KeyError) as error:  # it has no errors of its own
        raise InvalidInput(
            f"alignment.deepspeed.settings is not what DeepSpeed takes: {error} ({type(error).__name__}). Correct it."
        ) from None
    if unread := sorted(config.settings.keys() - read.names):
        raise InvalidInput(
            f"DeepSpeed has no setting {', '.join(unread)}, and would have passed over it. It has "
            f"{', '.join(sorted(name for name in read.names if isinstance(name, str)))}. Correct "
            "alignment.deepspeed.settings."
        )


def restrict_checkpoint_loading() -> None:
    """Have this process read checkpoints as tensors and plain data only.

    DeepSpeed asks torch to unpickle its checkpoints, which would run whatever code stands in them. Of classes they hold
    the three named here, which keep numbers.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch.load obeys it whatever its caller asks for
    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def _describe(config: DeepspeedConfig, *, use_gpu: bool, dtype: Literal["float32", "bfloat16"]) -> dict[str, Any]:
    """What follows from the recipe."""
    zero: dict[str, Any] = {"stage": config.stage}
    if config.stage == 3:
        # Otherwise what is saved holds no weights of a model that is trained as a whole.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # Memory is pinned for an accelerator's sake.
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": use_gpu}
    if config.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": use_gpu}
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": use_gpu and dtype == "bfloat16"},
        "zero_optimization": zero,
        # The optimiser is torch's AdamW, as without DeepSpeed. DeepSpeed's own would be compiled at the start, which
        # images without a compiler and CUDA's headers cannot do.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


class _ReadKeys(dict[str, Any]):
    """A dictionary that notes which keys it was asked for.

    DeepSpeed passes over top-level keys that it does not know, and nowhere lists those that it knows.
    """

    def __init__(self, values: dict[str, Any]):
        super().__init__(values)
        self.names: set[str] = set()

    def __copy__(self) -> Self:
        return self

    def __getitem__(self, key: str) -> Any:
        self.names.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        """Itself, as DeepSpeed asks `key in values.keys()`."""
        return self


def _drop_auto(values: dict[str, Any]) -> None:
    """Take out of `values` what transformers will fill in."""
    for key, value in list(values.items()):
        if value == "auto":
            del values[key]
        elif isinstance(value, dict):
            _drop_auto(value)


def _list_overlaps(ours: dict[str, Any], settings: dict[str, Any], place: str = "") -> Iterator[str]:
    for key in ours.keys() & settings.keys():
        if isinstance(ours[key], dict) and isinstance(settings[key], dict):
            yield from _list_overlaps(ours[key], settings[key], f"{place}{key}.")
        else:
            yield place + key


def _merge(ours: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    merged = ours | settings
    for key in ours.keys() & settings.keys():
        merged[key] = _merge(ours[key], settings[key])
    return merged
