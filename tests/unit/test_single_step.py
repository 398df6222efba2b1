"""One stage alone: which step of the recipe is meant, and with which inputs."""

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.recipe import load_recipe
from mint_lib.store import Store
from pipelines import single_step

VISION = pathlib.Path(__file__).parents[2] / "pipelines" / "recipes" / "quickstart_vision.yaml"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Configs of the stages that were asked for, in the place of running them."""
    configs: list[str] = []

    def run_stage(stage: str, config: str, inputs: Any, *, store: Store) -> Any:
        configs.append(config)
        return SimpleNamespace(reference=None)

    monkeypatch.setattr(single_step, "run_stage", run_stage)
    monkeypatch.setattr(single_step, "_given_inputs", lambda inputs, store: dict.fromkeys(inputs, "given"))
    return configs


@pytest.mark.parametrize(
    ("stage", "inputs"), [("preferences", ("cases", "rankings")), ("alignment", ("preferences", "start"))]
)
def test_stage_of_a_recipe_with_captions_is_that_of_the_main_student(
    asked: list[str], store: Store, stage: str, inputs: tuple[str, ...]
) -> None:
    recipe = load_recipe(VISION)
    single_step.run_single_step(recipe, stage, step_id=None, inputs=inputs, store=store)
    single_step.run_single_step(recipe, stage, step_id=f"{stage}-captioning", inputs=inputs, store=store)
    assert "captioning" not in asked[0]
    assert "captioning" in asked[1]


def test_step_that_the_recipe_does_not_have_is_refused_with_those_it_has(asked: list[str], store: Store) -> None:
    with pytest.raises(InvalidInput, match=r"no step 'x' of alignment.*alignment-orpo"):
        single_step.run_single_step(load_recipe(VISION), "alignment", step_id="x", inputs=(), store=store)
    assert asked == []
