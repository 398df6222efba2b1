"""The flow on cases that are in the store already."""

import pathlib

import pytest

from mint_lib.errors import InvalidInput
from mint_lib.flow import list_steps
from mint_lib.recipe import Retrain, load_recipe, parse_recipe
from mint_lib.records import Case, Label, Ranking, Reference, StageRecord
from mint_lib.rows import case_schema, ranking_schema
from mint_lib.store import Store
from pipelines.planning import plan_steps
from pipelines.retrain import list_ancestors, prepare_retraining

QUICKSTART = pathlib.Path(__file__).parents[2] / "pipelines" / "recipes" / "quickstart.yaml"
LABELS = [Label(id="D:1", name="First"), Label(id="D:2", name="Second")]


def spell(kind: str, number: int = 1) -> str:
    return f"{kind}/quickstart@v{number:06d}#sha256:{number:064x}"


def write_cases(store: Store, count: int, base: Reference | None = None) -> Reference:
    def case(number: int) -> Case:
        return Case(case_id=f"{number}", group_id=f"{number}", text=f"{number}", source="s", synthetic=True)

    with store.write("cases", "quickstart", base=base) as version:
        for index, split in enumerate(("train", "validation", "test")):
            if base is not None:
                version.carry_table(split)
            version.add_rows(split, [case(1000 * index + count)], case_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        inputs = {"base": str(base)} if base else {}
        counts = {"train/cases": count}
        return version.commit(StageRecord(stage="data", config={}, inputs=inputs, code_version="test", counts=counts))


def write_made_from(store: Store, kind: str, stage: str, config: dict[str, object], cases: Reference) -> Reference:
    with store.write(kind, "quickstart") as version:  # type: ignore[arg-type]
        ranking = Ranking(case_id="1", label_ids=("D:1", "D:2"), probabilities=(0.6, 0.4), teacher_digest="sha256:0")
        for split in ("train", "validation", "test"):
            version.add_rows(split, [ranking], ranking_schema())
        return version.commit(
            StageRecord(stage=stage, config=config, inputs={"cases": str(cases)}, code_version="test")
        )


def test_flow_on_cases_of_the_store_reads_no_source() -> None:
    recipe = load_recipe(QUICKSTART)
    retrain = Retrain(cases=spell("cases"), rankings=spell("rankings"), preferences=spell("preferences"))
    steps = {step.id: step for step in list_steps(recipe.model_copy(update={"retrain": retrain}))}
    assert "data" not in steps
    assert steps["teacher"].inputs == {"cases": spell("cases"), "previous": spell("rankings")}
    assert steps["preferences"].inputs["previous"] == spell("preferences")
    assert steps["evaluation"].inputs["cases"] == spell("cases")
    others = [step for step in steps.values() if step.stage == "teacher" and step.id != "teacher"]
    assert others
    assert all(step.inputs == {"cases": spell("cases")} for step in others)


@pytest.mark.parametrize(("key", "text"), [("cases", "cases/quickstart"), ("rankings", spell("cases"))])
def test_recipe_with_a_retrain_section_that_names_something_else_is_refused(key: str, text: str) -> None:
    values = load_recipe(QUICKSTART).model_dump(mode="json") | {"retrain": {"cases": spell("cases")} | {key: text}}
    with pytest.raises(InvalidInput, match="reference"):
        parse_recipe(values)


def test_retraining_finds_what_it_can_go_on_from(store: Store) -> None:
    recipe = load_recipe(QUICKSTART)
    first = write_cases(store, 1)
    config = recipe.teacher.model_dump(mode="json")
    rankings = write_made_from(store, "rankings", "teacher", config, first)
    write_made_from(store, "rankings", "teacher", config | {"seed": 99}, first)
    preferences = write_made_from(store, "preferences", "preferences", {}, first)
    second = write_cases(store, 2, first)
    third = write_cases(store, 3, second)
    assert list_ancestors(third, store=store) == [second, first]
    found = prepare_retraining(recipe, "cases/quickstart", store=store)
    assert found.retrain == Retrain(cases=str(third), rankings=str(rankings), preferences=str(preferences))
    planned = {item.step.id: item for item in plan_steps(found, store=store)}
    assert "from 3 cases" in planned["preferences"].estimate


def test_retraining_finds_its_rankings_over_a_version_that_was_removed(store: Store) -> None:
    recipe = load_recipe(QUICKSTART)
    first = write_cases(store, 1)
    rankings = write_made_from(store, "rankings", "teacher", recipe.teacher.model_dump(mode="json"), first)
    second = write_cases(store, 2, first)
    third = write_cases(store, 3, second)
    for old in store.list_old_versions("cases", "quickstart", keep_last=1):
        if not old.needed_by:
            store.remove_old_version(old)
    assert list_ancestors(third, store=store) == [first]
    found = prepare_retraining(recipe, "cases/quickstart", store=store)
    assert found.retrain == Retrain(cases=str(third), rankings=str(rankings))


def test_retraining_of_cases_that_did_not_grow_begins_anew(store: Store) -> None:
    recipe = load_recipe(QUICKSTART)
    first = write_cases(store, 1)
    write_made_from(store, "rankings", "teacher", recipe.teacher.model_dump(mode="json"), first)
    found = prepare_retraining(recipe, str(first), store=store).retrain
    assert found == Retrain(cases=str(first))


def test_retraining_on_something_else_than_cases_is_refused(store: Store) -> None:
    first = write_cases(store, 1)
    rankings = write_made_from(store, "rankings", "teacher", {}, first)
    with pytest.raises(InvalidInput, match="not a version of cases"):
        prepare_retraining(load_recipe(QUICKSTART), str(rankings), store=store)
