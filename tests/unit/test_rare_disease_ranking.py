import types
from typing import Any

import numpy as np
import pytest

from mint_lib.clinical.disease_names import NameTable
from mint_lib.evaluation_tasks.rare_disease_ranking import RareDiseaseRanking
from mint_lib.records import Case, Label, Ranking
from mint_lib.report_records import Prediction
from mint_lib.reporting import label_ranking
from mint_lib.reporting.material import Material
from mint_lib.reporting.ranking_scores import TeacherSides, measure_agreement, measure_generation, measure_ranking
from mint_lib.statistics import GroupBootstrap, Measurement
from mint_lib.template import Template

NAMES = ["Apert syndrome", "Joubert syndrome 1", "Noonan syndrome 1", "Kabuki syndrome 1", "Williams-Beuren syndrome"]
LABELS = tuple(Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(NAMES))
IDS = tuple(label.id for label in LABELS)


def value_of(measured: dict[str, Measurement], metric: str) -> float | None:
    num_cases = len(measured[metric].columns)
    groups = [str(index) for index in range(num_cases)]
    return GroupBootstrap(groups, draws=100, seed=0, confidence=0.95).estimate([measured[metric]]).value


def make_prediction(
    truth: str,
    ranked: tuple[str, ...] = IDS,
    probabilities: tuple[float, ...] = (0.4, 0.3, 0.15, 0.1, 0.05),
    **more: Any,
) -> Prediction:
    return Prediction(
        system="orpo", case_id="case", label_id=truth, ranked_ids=ranked, probabilities=probabilities, **more
    )


def make_material(num_cases: int = 4, top_k: int = 2, bottom_q: int = 2) -> Material:
    cases = [
        Case(
            case_id=f"case-{n}",
            group_id=f"p{n}",
            text="short stature",
            label_id=IDS[n % 5],
            source="test",
            synthetic=True,
        )
        for n in range(num_cases)
    ]
    ranking = {"label_ids": IDS, "probabilities": (0.4, 0.3, 0.15, 0.1, 0.05), "teacher_digest": "sha256:0"}
    return Material(
        cases=tuple(cases),
        labels=LABELS,
        template=Template.load("rare_disease").with_num_answers(top_k),
        teacher={case.case_id: Ranking(case_id=case.case_id, **ranking) for case in cases},
        top_k=top_k,
        bottom_q=bottom_q,
        label_counts={IDS[0]: 6, IDS[1]: 2, IDS[2]: 2, IDS[3]: 0, IDS[4]: 0},
        seed=1,
    )


def make_task(**config: Any) -> RareDiseaseRanking:
    return RareDiseaseRanking(RareDiseaseRanking.Config(**config), make_material())


def score(predictions: list[Prediction]) -> dict[str, Measurement]:
    return measure_ranking(predictions, tops=(1, 3, 10))


def make_names(**options: Any) -> NameTable:
    diseases = {
        "OMIM:900": ("Marfan syndrome",),
        "ORPHA:900": ("Marfan syndrome",),
        "OMIM:2": ("Male Turner syndrome",),
    }
    return NameTable(LABELS, diseases=diseases, fuzzy_ratio=0.9, **options)


def test_ranking_scores_a_known_order() -> None:
    measured = score([make_prediction(IDS[0]), make_prediction(IDS[2]), make_prediction(IDS[4])])
    assert value_of(measured, "top_1") == pytest.approx(1 / 3)
    assert value_of(measured, "top_3") == pytest.approx(2 / 3)
    assert value_of(measured, "mrr") == pytest.approx((1 + 1 / 3 + 1 / 5) / 3)
    assert value_of(measured, "macro_top_1") == pytest.approx(1 / 3)


def test_ranking_leaves_out_a_top_k_that_the_label_set_does_not_exceed() -> None:
    assert "top_10" not in score([make_prediction(IDS[0])])


def test_ranking_with_equal_probabilities_shares_the_ranks() -> None:
    measured = score([make_prediction(IDS[0], probabilities=(0.2,) * 5)])
    assert value_of(measured, "top_1") == pytest.approx(0.2)
    assert value_of(measured, "top_3") == pytest.approx(0.6)
    assert value_of(measured, "mrr") == pytest.approx(np.mean(1 / np.arange(1, 6)))


def test_agreement_of_an_output_that_is_exactly_the_rejected_list_avoids_nothing() -> None:
    sides = [TeacherSides(frozenset(IDS[:2]), frozenset(IDS[3:]))]
    measured = measure_agreement([IDS[3:]], sides, car_lambda=0.5)
    assert [value_of(measured, metric) for metric in ("coverage", "avoidance", "car")] == [0.0, 0.0, 0.0]


def test_agreement_of_the_chosen_list_is_complete() -> None:
    sides = [TeacherSides(frozenset(IDS[:2]), frozenset(IDS[3:]))]
    measured = measure_agreement([(IDS[1], IDS[0])], sides, car_lambda=0.5)
    assert [value_of(measured, metric) for metric in ("coverage", "avoidance", "car")] == [1.0, 1.0, 1.0]


def test_agreement_of_an_empty_answer_is_zero_and_of_a_case_not_asked_does_not_count() -> None:
    sides = [TeacherSides(frozenset(IDS[:2]), frozenset(IDS[3:]))] * 3
    measured = measure_agreement([(), IDS[:2], None], sides, car_lambda=0.5)
    assert value_of(measured, "coverage") == 0.5
    assert value_of(measured, "avoidance") == 0.5


def test_agreement_counts_half_a_list() -> None:
    sides = [TeacherSides(frozenset(IDS[:2]), frozenset(IDS[3:]))]
    measured = measure_agreement([(IDS[0], IDS[4])], sides, car_lambda=1.0)
    assert [value_of(measured, metric) for metric in ("coverage", "avoidance", "car")] == [0.5, 0.5, 0.5]


def test_generation_with_one_real_and_nine_invented_names_shows_ninety_percent_invented() -> None:
    names = (IDS[0], *["unknown"] * 9)
    measured = measure_generation([make_prediction(IDS[0], generated=names)], top_k=10)
    assert value_of(measured, "invented") == pytest.approx(0.9)
    assert value_of(measured, "top_1") == 1.0


def test_generation_that_lists_nothing_stays_in_the_denominator_as_wrong() -> None:
    rows = [make_prediction(IDS[0], generated=()), make_prediction(IDS[0], generated=(IDS[0], IDS[1]))]
    measured = measure_generation(rows, top_k=2)
    assert [value_of(measured, metric) for metric in ("top_1", "top_k", "mrr", "complete")] == [0.5, 0.5, 0.5, 0.5]
    assert measured["top_1"].n == 2


def test_generation_counts_only_the_cases_that_were_asked() -> None:
    rows = [make_prediction(IDS[0]), make_prediction(IDS[1], generated=(IDS[0], IDS[1]))]
    measured = measure_generation(rows, top_k=2)
    assert measured["top_1"].n == 1
    assert value_of(measured, "mrr") == 0.5


def test_generation_near_miss_never_counts_as_a_hit() -> None:
    measured = measure_generation([make_prediction(IDS[0], generated=(f"fuzzy:{IDS[0]}",))], top_k=1)
    assert value_of(measured, "top_1") == 0.0
    assert value_of(measured, "fuzzy_top_1") == 1.0
    assert value_of(measured, "invented") == 1.0


def test_generation_tells_a_disease_outside_the_set_from_an_invented_one() -> None:
    measured = measure_generation([make_prediction(IDS[0], generated=("outside:OMIM:900", "unknown"))], top_k=2)
    assert (value_of(measured, "outside"), value_of(measured, "invented")) == (0.5, 0.5)


@pytest.mark.parametrize("name", ["OMIM:0", "omim:0", "Apert syndrome", "APERT SYNDROME", " apert  syndrome. "])
def test_name_table_resolves_ids_and_spellings(name: str) -> None:
    assert make_names().resolve(name) == "OMIM:0"


def test_name_table_resolves_synonyms_of_the_label_and_of_the_ontology() -> None:
    labels = (
        Label(id="OMIM:5", name="Noonan syndrome 1", synonyms=("NS1",)),
        Label(id="OMIM:2", name="Apert syndrome"),
    )
    table = NameTable(labels, diseases={"OMIM:2": ("Acrocephalosyndactyly I",)}, fuzzy_ratio=0.9)
    assert table.resolve("ns1") == "OMIM:5"
    assert table.resolve("Acrocephalosyndactyly I") == "OMIM:2"


def test_name_table_does_not_take_another_disease_for_a_similar_name() -> None:
    assert make_names().resolve("Jobert syndrome") != "OMIM:1"
    assert make_names().resolve("Marfan syndrome") == "outside:OMIM:900"
    assert make_names().resolve("Aperts syndrome") == "fuzzy:OMIM:0"
    assert make_names().resolve("Greenwater syndrome") == "unknown"


def test_name_table_leaves_a_synonym_of_two_labels_unresolved() -> None:
    labels = tuple(Label(id=f"OMIM:{n}", name=f"Disease {n}", synonyms=("XYZ",)) for n in range(2))
    assert NameTable(labels, diseases={}, fuzzy_ratio=0.9).resolve("XYZ") == "unknown"


def test_task_guesses_chance_and_the_most_frequent_training_label() -> None:
    task = make_task()
    guesses = task.guess()
    assert value_of(task.measure(guesses["chance"]), "top_1") == pytest.approx(0.2)
    assert guesses["majority"][0].ranked_ids[0] == IDS[0]
    assert value_of(task.measure(guesses["majority"]), "top_1") == pytest.approx(0.25)
    assert "coverage" not in task.measure(guesses["majority"])


def test_task_does_not_compare_the_teacher_with_itself() -> None:
    task = make_task()
    adopted = task.adopt(task.material.teacher, system="teacher")
    assert "coverage" not in task.measure(adopted)
    renamed = [row.model_copy(update={"system": "other"}) for row in adopted]
    assert value_of(task.measure(renamed), "coverage") == 1.0


def test_task_answer_ranks_all_cases_and_generates_for_the_drawn_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.log(np.array([[0.1, 0.1, 0.6, 0.1, 0.1]] * 4))
    texts = ["POTENTIAL_DISEASES:\n\n1. 'NOONAN SYNDROME 1'\n\n2. 'Nonsense disease'", ""]
    monkeypatch.setattr(label_ranking, "rank_labels", lambda *_, **__: scores)
    monkeypatch.setattr(label_ranking, "encode_answer", lambda *_: [0] * 20)
    monkeypatch.setattr(label_ranking, "generate_answers", lambda *_, **__: texts)
    monkeypatch.setattr(RareDiseaseRanking, "load_outside_names", lambda _: {})
    task = make_task(generation_cases=2)
    rows = task.answer(None, types.SimpleNamespace(tokenizer=None), system="orpo")  # type: ignore[arg-type]
    assert [row.ranked_ids[0] for row in rows] == [IDS[2]] * 4
    assert sorted(map(str, (row.generated for row in rows))) == sorted(map(str, [None, None, (IDS[2], "unknown"), ()]))
    assert "real diseases outside the label set count as invented" in " ".join(task.describe())


def test_task_every_measured_metric_is_described() -> None:
    task = make_task()
    rows = [
        make_prediction(case.label_id or "", generated=(IDS[0],)).model_copy(update={"case_id": case.case_id})
        for case in task.material.cases
    ]
    # Ten labels and more would have a top-10.
    assert set(task.measure(rows)) == set(task.metrics) - {"top_10"}
    assert set(task.tests) <= set(task.measure(rows))
