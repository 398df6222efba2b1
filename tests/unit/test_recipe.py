import pathlib
import subprocess
import sys

import pytest
import yaml

from mint_lib.errors import RecipeError
from mint_lib.flow import list_steps
from mint_lib.recipe import load_recipe, override_section, parse_recipe, recipe_json_schema

FOLDER = pathlib.Path(__file__).parents[2] / "pipelines" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
QUICKSTART = FOLDER / "quickstart.yaml"


def _values():
    return yaml.safe_load(QUICKSTART.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_names_itself_and_gives_steps(path):
    recipe = load_recipe(path)
    assert recipe.name.replace("-", "_") == path.stem
    steps = list_steps(recipe)
    assert [step.stage for step in steps][-2:] == ["evaluation", "registry"]
    assert len({(step.stage, step.config.name) for step in steps}) == len(steps)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_step_comes_after_its_inputs(path):
    seen = set()
    for step in list_steps(load_recipe(path)):
        for source in step.inputs.values():
            assert {source} if isinstance(source, str) else set(source.values()) <= seen
        seen.add(step.id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"aligment": {}}, "aligment: unknown key; did you mean 'alignment'"),
        ({"preferences": {"topk": 3}}, "preferences.topk: unknown key; did you mean 'top_k'"),
        (
            {"data": {"source": "simulated_patients", "config": {"patients_per_labels": 3}}},
            "did you mean 'patients_per_label'",
        ),
        ({"teacher": {"model": "vlt"}}, "Did you mean 'vilt'"),
        ({"alignment": {"lora": {"rnk": 2}}}, "alignment.lora.rnk: unknown key; did you mean 'rank'"),
        ({"alignment": {"epochs": "many"}}, r"alignment.epochs: .*integer.*'many'"),
        ({"seed": -1}, "seed: .*greater than or equal to 0"),
        ({"name": "Quick Start"}, "name: "),
        ({"description": "{{$.inputs}}"}, "Kubeflow placeholder"),
        ({"student_seeds": [1, 1]}, "twice"),
        ({"arms": {}}, "arms: "),
        ({"captioning": {}}, "captioning is for students that read images"),
    ],
)
def test_recipe_with_a_wrong_value_is_refused_in_words(change, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(_values() | change)


def test_recipe_with_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(QUICKSTART.read_text() + "\nseed: 18\n")
    with pytest.raises(RecipeError, match="key given twice: seed"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["- a\n", "", "a: [", "!!python/object/apply:os.getcwd []"])
def test_recipe_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        load_recipe(path)


def test_recipe_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="Cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_override_changes_one_value_and_nothing_else():
    before, after = load_recipe(QUICKSTART), load_recipe(QUICKSTART, overrides=("alignment.lora.rank=3",))
    assert after.alignment.lora.rank == 3
    lora = after.alignment.lora.model_copy(update={"rank": before.alignment.lora.rank})
    assert after.model_copy(update={"alignment": after.alignment.model_copy(update={"lora": lora})}) == before


@pytest.mark.parametrize("override", ["alignment.epochs", "seed.x=1"])
def test_override_that_names_no_value_is_refused(override):
    with pytest.raises(RecipeError, match="--set"):
        load_recipe(QUICKSTART, overrides=(override,))


def test_section_whose_plugin_changes_starts_from_that_plugins_defaults():
    recipe = load_recipe(QUICKSTART, overrides=("alignment.method_config.beta=0.7",))
    changed = override_section("alignment", recipe.alignment, {"method": "sft"})
    assert "beta" not in changed.method_config
    kept = override_section("alignment", recipe.alignment, {"epochs": 9})
    assert kept.method_config["beta"] == 0.7


def test_arms_that_change_nothing_upstream_share_their_steps():
    steps = list_steps(load_recipe(QUICKSTART))
    assert sum(step.stage == "preferences" for step in steps) == 1
    assert sum(step.stage == "alignment" for step in steps) == len(load_recipe(QUICKSTART).arms)


def test_student_seeds_give_every_arm_once_for_each_seed():
    recipe = parse_recipe(_values() | {"student_seeds": [1, 2]})
    students = next(step for step in list_steps(recipe) if step.stage == "evaluation").inputs["students"]
    assert sorted(students) == sorted(f"{arm}/seed-{seed}" for arm in recipe.arms for seed in (1, 2))


def test_captioning_comes_before_every_arm_that_does_not_leave_it_out():
    values = _values() | {
        "student": {"model": "tiny-image", "reads": "image"},
        "captioning": {"alignment": {"epochs": 9}},
        "arms": {"orpo": {}, "sft": {}, "no-captions": {"captioning": False}},
    }
    values["preferences"] = values["preferences"] | {"template": "tissue"}
    values["alignment"] = {"method": "orpo"}
    steps = {step.id: step for step in list_steps(parse_recipe(values))}
    first = steps["alignment-captioning"]
    assert (first.config.epochs, first.config.keep_best, "start" in first.inputs) == (9, "loss", False)
    assert steps[first.inputs["preferences"]].config.pairs == "captions"
    starts = {name: steps[f"alignment-{name}"].inputs.get("start") for name in ("orpo", "sft", "no-captions")}
    assert starts == {"orpo": "alignment-captioning", "sft": "alignment-captioning", "no-captions": None}
    assert steps["evaluation"].inputs["students"]["captioning"] == "alignment-captioning"
    assert steps["registry"].inputs["student"] == "alignment-orpo"


def test_schema_accepts_every_recipe_and_refuses_an_unknown_key():
    import jsonschema

    schema = recipe_json_schema()
    for path in RECIPES:
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_values() | {"aligment": {}}, schema)


def test_recipe_loads_without_any_heavy_package():
    heavy = [
        "torch",
        "transformers",
        "ray",
        "trl",
        "peft",
        "deepspeed",
        "kfp",
        "kserve",
        "pyarrow",
        "matplotlib",
        "datasets",
    ]
    code = (
        "import pathlib, sys; from mint_lib.recipe import load_recipe\n"
        f"load_recipe(pathlib.Path({str(QUICKSTART)!r}))\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
