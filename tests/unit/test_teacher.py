"""Qualification, floor and rankings of any teacher, on scores made by hand."""

import numpy as np
import pytest
from pydantic import ValidationError

from mint_lib.calibration import normalise_scores
from mint_lib.errors import GateFailed, RecipeError
from mint_lib.plugins import list_plugins, load_plugin
from mint_lib.records import Case, Label
from mint_lib.teacher import Teacher, TeacherConfig, check_floor, digest_folder, qualify, rank_scores

LABELS = [Label(id=f"OMIM:{number}", name=f"Disease {number}") for number in range(12)]


def make_cases(truth, *, visits=1):
    return [
        Case(
            case_id=f"case-{number}",
            group_id=f"patient-{number // visits}",
            text="text",
            label_id=LABELS[column].id,
            source="toy",
            synthetic=True,
        )
        for number, column in enumerate(truth)
    ]


def make_scores(truth, ranks):
    """Scores that put the right label of every case at its rank."""
    scores = np.zeros((len(truth), len(LABELS)))
    for row, column, rank in zip(scores, truth, ranks, strict=True):
        others = [other for other in range(len(LABELS)) if other != column]
        for place, other in enumerate([*others[: rank - 1], column, *others[rank - 1 :]]):
            row[other] = -place
    return scores


def make_config(**floor):
    return TeacherConfig.model_validate({"name": "toy", "seed": 1, "model": "ontology", "floor": floor})


def test_qualification_counts_ranks():
    truth = [0, 3, 5, 7, 11, 2]
    ranks = [1, 1, 2, 3, 10, 12]
    found = qualify(make_scores(truth, ranks), make_cases(truth), LABELS, seed=0)
    values = {name: estimate["value"] for name, estimate in found["metrics"].items()}
    assert values["top_1"] == pytest.approx(2 / 6)
    assert values["top_3"] == pytest.approx(4 / 6)
    assert values["top_10"] == pytest.approx(5 / 6)
    assert values["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found["chance"]["top_3"] == pytest.approx(0.25)
    assert found["chance"]["mrr"] == pytest.approx(np.mean(1 / np.arange(1, 13)))


def test_qualification_interval_counts_patients_not_visits():
    truth = [0, 1] * 20
    scores = make_scores(truth, [1 + number // 2 % 2 for number in range(40)])
    by_visit = qualify(scores, make_cases(truth), LABELS, seed=0)["metrics"]["top_1"]
    by_patient = qualify(scores, make_cases(truth, visits=2), LABELS, seed=0)["metrics"]["top_1"]
    assert by_visit["low"] < by_visit["value"] == 0.5 < by_visit["high"]
    assert by_patient["high"] - by_patient["low"] > 1.2 * (by_visit["high"] - by_visit["low"])


def test_qualification_calibration_improves_on_overconfident_scores():
    rng = np.random.default_rng(0)
    calibrated = rng.normal(scale=2.0, size=(1000, 12))
    truth = [int(rng.choice(12, p=row)) for row in normalise_scores(calibrated)]
    found = qualify(calibrated * 5, make_cases(truth), LABELS, seed=0)
    assert found["nll_after"] < found["nll_before"]
    assert found["metrics"]["ece_after"]["value"] < 0.1 < found["metrics"]["ece_before"]["value"]
    assert found["temperature"] == pytest.approx(5, rel=0.15)


def test_qualification_of_equal_scores_does_not_depend_on_the_truth_being_first():
    truth = [11] * 10
    found = qualify(np.zeros((10, 12)), make_cases(truth), LABELS, seed=0)
    assert found["metrics"]["top_1"]["value"] == 0


@pytest.mark.parametrize(("value", "passes"), [(0.49, True), (0.5, True), (0.51, False)])
def test_floor_decides_on_the_metric_it_names(value, passes):
    truth = [0, 1, 2, 3]
    qualification = qualify(make_scores(truth, [1, 1, 4, 4]), make_cases(truth), LABELS, seed=0)
    config = make_config(metric="top_3", value=value)
    if passes:
        check_floor(qualification, config)
        return
    with pytest.raises(GateFailed, match=r"top_3 0\.500 .*4 validation cases.*floor is 0\.51 and chance is 0\.250"):
        check_floor(qualification, config)


def test_floor_metric_that_is_not_a_number_fails():
    truth = [0, 1]
    qualification = qualify(make_scores(truth, [1, 1]), make_cases(truth), LABELS, seed=0)
    qualification["metrics"]["top_1"]["value"] = float("nan")
    with pytest.raises(GateFailed):
        check_floor(qualification, make_config(metric="top_1", value=0.0))


def test_rankings_follow_the_scores_even_where_probabilities_vanish():
    truth = [4]
    scores = make_scores(truth, [3]) * 1000
    [ranking] = rank_scores(make_cases(truth), scores, LABELS, 0.5, "sha256:" + "1" * 64)
    assert ranking.label_ids == tuple(LABELS[place].id for place in (0, 1, 4, 2, 3, 5, 6, 7, 8, 9, 10, 11))
    assert sum(ranking.probabilities) == pytest.approx(1)


def test_folder_digest_changes_with_names_and_bytes(tmp_path):
    (tmp_path / "a").write_text("1")
    first = digest_folder(tmp_path)
    (tmp_path / "a").write_text("2")
    second = digest_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert len({first, second, digest_folder(tmp_path)}) == 3


@pytest.mark.parametrize("name", list_plugins("teachers"))
def test_teacher_plugin_loads_and_documents_its_config(name):
    plugin = load_plugin("teachers", name, base=Teacher)
    fields = plugin.Config.model_json_schema()["properties"]
    assert all(field.get("description") for field in fields.values())


def test_teacher_of_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(RecipeError, match="ontology"):
        load_plugin("teachers", "ontolgy", base=Teacher)


@pytest.mark.parametrize("floor", [{"value": 1.1}, {"metric": "top_5"}, {"level": 1}])
def test_teacher_config_with_a_wrong_floor_is_refused(floor):
    with pytest.raises(ValidationError):
        make_config(**floor)
