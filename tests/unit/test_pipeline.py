import ast
import importlib
import json
import pathlib

import pytest
import yaml
from kfp import compiler

from mint_lib.flow import list_steps
from mint_lib.recipe import load_recipe
from mint_lib.stages import STAGES
from pipelines.mint import build_pipeline

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))


def _compile(recipe, path):
    compiler.Compiler().compile(build_pipeline(recipe), str(path))
    return next(yaml.safe_load_all(path.read_text()))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_compiles_to_one_task_a_step(path, tmp_path):
    recipe = load_recipe(path)
    compiled = _compile(recipe, tmp_path / "pipeline.yaml")
    tasks = compiled["root"]["dag"]["tasks"]
    assert sorted(task["taskInfo"]["name"] for task in tasks.values()) == sorted(s.id for s in list_steps(recipe))


def test_config_crosses_kubeflow_unchanged(tmp_path):
    recipe = load_recipe(ROOT / "pipelines/recipes/quickstart.yaml", overrides=("seed=4294967295",))
    tasks = _compile(recipe, tmp_path / "pipeline.yaml")["root"]["dag"]["tasks"]
    for step in list_steps(recipe):
        task = next(task for task in tasks.values() if task["taskInfo"]["name"] == step.id)
        text = task["inputs"]["parameters"]["config"]["runtimeValue"]["constant"]
        assert json.loads(text) == step.config.model_dump(mode="json")
        assert type(step.config).model_validate_json(text) == step.config


def test_components_run_on_our_image_and_install_nothing(tmp_path):
    compiled = _compile(load_recipe(RECIPES[0]), tmp_path / "pipeline.yaml")
    for executor in compiled["deploymentSpec"]["executors"].values():
        assert "mint" in executor["container"]["image"]
        assert "pip install" not in " ".join(executor["container"]["command"])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_component_that_takes_its_inputs(stage):
    component = getattr(importlib.import_module(f"components.{stage}"), stage)
    inputs = set(component.component_spec.inputs)
    assert inputs == {"config", *STAGES[stage].inputs, *STAGES[stage].input_maps}


@pytest.mark.parametrize("stage", STAGES)
def test_every_component_is_thin(stage):
    source = (ROOT / "components" / f"{stage}.py").read_text()
    function = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
    assert function.end_lineno - function.lineno <= 25
