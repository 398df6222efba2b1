"""DeepSpeed's configuration: what is rendered, what DeepSpeed makes of it, and what is refused before work starts."""

from typing import Any

import pytest
from pydantic import ValidationError

from mint_lib.errors import InvalidInput
from mint_lib.training.deepspeed import DeepspeedConfig, check_deepspeed, render_deepspeed


def render(config: DeepspeedConfig, *, use_gpu: bool = True, dtype: Any = "bfloat16") -> dict[str, Any]:
    return render_deepspeed(config, use_gpu=use_gpu, dtype=dtype)


@pytest.mark.parametrize(
    ("values", "use_gpu", "zero"),
    [
        ({"stage": 2}, True, {"stage": 2}),
        ({"stage": 3}, True, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}),
        (
            {"stage": 2, "offload": "optimizer"},
            False,
            {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
        ),
        (
            {"stage": 3, "offload": "optimizer_and_parameters"},
            True,
            {
                "stage": 3,
                "stage3_gather_16bit_weights_on_model_save": True,
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
                "offload_param": {"device": "cpu", "pin_memory": True},
            },
        ),
    ],
)
def test_deepspeed_stage_and_offload_are_zeros_own(values: dict[str, Any], use_gpu: bool, zero: dict[str, Any]) -> None:
    assert render(DeepspeedConfig(**values), use_gpu=use_gpu)["zero_optimization"] == zero


@pytest.mark.parametrize(
    ("use_gpu", "dtype", "enabled"),
    [(True, "bfloat16", True), (True, "float32", False), (False, "bfloat16", False), (False, "float32", False)],
)
def test_deepspeed_computes_in_bfloat16_as_the_trainer_does(use_gpu: bool, dtype: str, enabled: bool) -> None:
    assert render(DeepspeedConfig(stage=2), use_gpu=use_gpu, dtype=dtype)["bf16"] == {"enabled": enabled}


def test_deepspeed_further_settings_stand_beside_ours() -> None:
    config = DeepspeedConfig(stage=2, settings={"zero_optimization": {"overlap_comm": True}, "steps_per_print": 7})
    rendered = render(config)
    assert rendered["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert rendered["steps_per_print"] == 7
    assert rendered["gradient_clipping"] == "auto"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_optimization": {"stage": 1}}, r"zero_optimization\.stage"),
        ({"zero_optimization": True}, "zero_optimization"),
        ({"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}, r"bf16\.enabled, train_micro_batch"),
    ],
)
def test_deepspeed_setting_that_follows_from_the_recipe_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=f"settings sets {named}"):
        DeepspeedConfig(stage=2, settings=settings)


def test_deepspeed_parameters_are_offloaded_at_stage_3_only() -> None:
    with pytest.raises(ValidationError, match="optimizer_and_parameters needs stage: 3"):
        DeepspeedConfig(stage=2, offload="optimizer_and_parameters")


@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer_and_parameters"])
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reads_all_that_is_rendered(stage: Any, offload: Any) -> None:
    if (stage, offload) == (2, "optimizer_and_parameters"):
        return
    pytest.importorskip("deepspeed")
    config = DeepspeedConfig(
        stage=stage,
        offload=offload,
        settings={
            "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": "auto"},
            "flops_profiler": {"enabled": False},
            "activation_checkpointing": {"partition_activations": False},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "aio": {"block_size": 1048576},
        },
    )
    check_deepspeed(config)
    assert config.settings["optimizer"]["params"] == {"lr": "auto"}, "it reads a copy"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_optimisation": {"overlap_comm": True}}, "no setting zero_optimisation"),
        ({"overlap_comm": True}, "no setting overlap_comm"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_com: Extra inputs"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 2.0}}}, "less than or equal to 1"),
        ({"bf16": {"immediate": True}}, "immediate: Extra inputs"),
        ({"fp16": {"enabled": "perhaps"}}, "enabled"),
    ],
)
def test_deepspeed_setting_that_it_does_not_know_is_refused(settings: dict[str, Any], named: str) -> None:
    pytest.importorskip("deepspeed")
    with pytest.raises(InvalidInput, match=named):
        check_deepspeed(DeepspeedConfig(stage=2, settings=settings))
