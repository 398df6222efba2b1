from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mint_lib.errors import InvalidInput, RefusedData
from mint_lib.evaluation import check_names
from mint_lib.plugins import load_plugin
from mint_lib.reading import TextReader
from mint_lib.records import Case, Label, Ranking, Reference
from mint_lib.report_records import EvaluationReport, Prediction
from mint_lib.reporting.assembly import build_report, flatten_metrics
from mint_lib.reporting.findings import GateRule, Resampling, compare_systems, decide_gate, estimate_slices
from mint_lib.reporting.material import Material, check_rankings, select_cases
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.reporting.task import EvaluationTask
from mint_lib.statistics import Measurement, measure_mean
from mint_lib.student import StudentConfig
from mint_lib.template import Template

LABELS = (
    Label(id="OMIM:1", name="Noonan syndrome 1", family="Noonan"),
    Label(id="OMIM:2", name="Noonan syndrome 4", family="Noonan"),
    Label(id="OMIM:3", name="Kabuki syndrome 1"),
)
IDS = tuple(label.id for label in LABELS)
REFERENCE = Reference.parse(f"student/s@v000001#sha256:{'0' * 64}")
RESAMPLING = Resampling(draws=500, seed=0, confidence=0.95)


class WordTokenizer:
    """One token a word, and one for every turn."""

    all_special_tokens = ("<end>",)
    all_special_ids = (0,)
    eos_token_id = 0

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, **_: Any) -> Any:
        text = "".join(f"<{turn['role']}> {turn['content']} " for turn in turns)
        return [1] * len(text.split()) if tokenize else text

    def encode(self, text: str, **_: Any) -> list[int]:
        return [1] * len(text.split())


def make_config(**values: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate(
        {"name": "report", "seed": 1, "student": {"model": "tiny"}, "main": "orpo", "bootstrap_draws": 200} | values
    )


def make_case(number: int, **values: Any) -> Case:
    known = {"case_id": f"case-{number}", "group_id": f"patient-{number}", "text": "short stature", "source": "test"}
    return Case.model_validate(known | {"label_id": IDS[number % 3], "synthetic": True} | values)


def make_material(num_cases: int = 30, **values: Any) -> Material:
    cases = tuple(make_case(number, attributes={"sex": "female"} if number % 2 else {}) for number in range(num_cases))
    rankings = {
        case.case_id: Ranking(
            case_id=case.case_id, label_ids=IDS, probabilities=(0.5, 0.3, 0.2), teacher_digest="sha256:0"
        )
        for case in cases
    }
    known: dict[str, Any] = {
        "cases": cases,
        "labels": LABELS,
        "template": Template.load("rare_disease"),
        "teacher": rankings,
        "top_k": 1,
        "bottom_q": 1,
        "label_counts": dict.fromkeys(IDS, 4),
        "seed": 1,
    }
    return Material(**(known | values))


def make_task(material: Material) -> EvaluationTask:
    plugin = load_plugin("evaluation_tasks", "rare_disease_ranking", base=EvaluationTask)  # type: ignore[type-abstract]
    return plugin(plugin.Config(), material)


def answer(material: Material, system: str, *, hit_share: float, seed: int = 0) -> list[Prediction]:
    hits = np.random.default_rng(seed).random(len(material.cases)) < hit_share
    rows = []
    for case, is_hit in zip(material.cases, hits, strict=True):
        truth = str(case.label_id)
        others = [label_id for label_id in IDS if label_id != truth]
        ranked = (truth, *others) if is_hit else (others[0], truth, others[1])
        probabilities = (0.6, 0.3, 0.1)
        rows.append(
            Prediction(
                system=system, case_id=case.case_id, label_id=truth, ranked_ids=ranked, probabilities=probabilities
            )
        )
    return rows


def make_report(
    shares: dict[str, float], *, material: Material | None = None, baselines: tuple[str, ...] = (), **config: Any
) -> EvaluationReport:
    material = material or make_material()
    task = make_task(material)
    answers = {
        name: answer(material, name, hit_share=share, seed=seed) for seed, (name, share) in enumerate(shares.items())
    }
    return build_report(
        make_config(**config),
        task,
        answers | task.guess(),
        baselines=baselines,
        inputs={},
        counts={"measured_cases": len(material.cases), "measured_patients": len(material.cases), "labels": 3},
        notes=(),
    )


def test_check_names_with_a_student_called_like_a_reserved_system_refuses() -> None:
    with pytest.raises(InvalidInput, match="teacher"):
        check_names(make_config(), {"orpo": REFERENCE, "teacher": REFERENCE}, {})


def test_check_names_with_a_baseline_called_like_a_student_refuses() -> None:
    with pytest.raises(InvalidInput, match="sft"):
        check_names(make_config(), {"orpo": REFERENCE, "sft/seed-1": REFERENCE}, {"sft": REFERENCE})


def test_check_names_without_the_main_student_refuses() -> None:
    with pytest.raises(InvalidInput, match=r"'orpo' is not among the students sft"):
        check_names(make_config(), {"sft": REFERENCE}, {})


def test_config_with_an_unknown_key_in_a_gate_rule_refuses() -> None:
    with pytest.raises(ValidationError):
        make_config(gate=[{"metric": "top_1", "at_most": 1.0}])


def test_select_cases_counts_every_cause() -> None:
    rows = [
        make_case(0),
        make_case(1, label_id=None),
        make_case(2, label_id="OMIM:9"),
        make_case(3, text=None, image=b"\x89PNG"),
        make_case(4, text="word " * 400),
    ]
    kept, refused = select_cases(
        rows,
        LABELS,
        Template.load("rare_disease"),
        TextReader(WordTokenizer()),  # type: ignore[arg-type]
        window_tokens=200,
        max_refused_share=0.2,
    )
    assert [case.case_id for case in kept] == ["case-0"]
    assert refused == {
        "no_label": ["case-1"],
        "other_label": ["case-2"],
        "no_text": ["case-3"],
        "longer_than_window": ["case-4"],
    }


def test_select_cases_with_too_many_long_texts_refuses_with_counts_and_ids_but_no_content() -> None:
    rows = [make_case(0), make_case(1, text="secret " * 400)]
    with pytest.raises(RefusedData, match="longer_than_window: 1") as caught:
        select_cases(
            rows,
            LABELS,
            Template.load("rare_disease"),
            TextReader(WordTokenizer()),  # type: ignore[arg-type]
            window_tokens=200,
            max_refused_share=0.2,
        )
    assert caught.value.case_ids == {"longer_than_window": ["case-1"]}
    assert "secret" not in str(caught.value)


def test_select_cases_of_an_empty_test_set_refuses() -> None:
    with pytest.raises(RefusedData, match="0 of 0 test cases"):
        select_cases(
            [],
            LABELS,
            Template.load("rare_disease"),
            TextReader(WordTokenizer()),  # type: ignore[arg-type]
            window_tokens=200,
            max_refused_share=0.0,
        )


def test_check_rankings_without_a_case_names_it() -> None:
    material = make_material(3)
    partial = {case_id: ranking for case_id, ranking in material.teacher.items() if case_id != "case-1"}
    with pytest.raises(InvalidInput, match="case-1"):
        check_rankings(material, partial, where="rankings/r")


def test_report_of_a_clearly_better_student_says_so_and_passes_its_gate() -> None:
    rule = {"metric": "top_1", "over": "base", "at_least": 0.1}
    report = make_report({"orpo": 0.9, "base": 0.2, "teacher": 1.0}, gate=[rule])
    assert report.gate.passed
    assert "above the base student" in report.headline
    assert list(report.order)[:3] == ["orpo", "base", "teacher"]
    assert report.synthetic == "all"


def test_report_of_a_student_like_its_base_says_that_nothing_is_shown() -> None:
    report = make_report({"orpo": 0.5, "base": 0.5}, gate=[{"metric": "top_1", "over": "base", "at_least": 0.0}])
    assert not report.gate.passed
    assert "not shown to be better than the base student" in report.headline


def test_report_of_a_student_below_a_baseline_says_so() -> None:
    report = make_report({"orpo": 0.3, "base": 0.2, "ontology": 0.95}, baselines=("ontology",))
    assert any(text.startswith("ORPO is below the ontology baseline") for text in report.statements)
    assert report.roles["ontology"] == "baseline"


def test_report_of_few_patients_warns() -> None:
    assert any("Few cases" in text for text in make_report({"orpo": 0.5, "base": 0.5}).statements)


def test_report_of_several_seeds_is_of_arms_and_names_how_many() -> None:
    shares = {"orpo/seed-1": 0.9, "orpo/seed-2": 0.8, "shuffled-teacher/seed-1": 0.2, "shuffled-teacher/seed-2": 0.3}
    report = make_report(shares | {"base": 0.2})
    assert list(report.order)[:2] == ["orpo", "shuffled-teacher"]
    assert report.runs["orpo"] == 2
    assert any("mean of 2 seeds" in text for text in report.statements)
    lead = next(item for item in report.comparisons if item.other == "shuffled-teacher" and item.metric == "top_1")
    assert lead.difference.low is not None
    assert lead.difference.low > 0


def test_report_slices_by_family_photo_and_attribute() -> None:
    report = make_report({"orpo": 0.9, "base": 0.2})
    assert set(report.slices) == {"family", "photo", "label", "sex"}
    assert report.slices["family"]["Noonan"]["orpo"]["top_1"].n == 20
    assert report.slices["sex"]["female"]["base"]["top_1"].n == 15
    assert list(report.slices["photo"]) == ["without photo"]


def test_report_made_twice_is_the_same() -> None:
    first, second = (make_report({"orpo": 0.9, "base": 0.2, "teacher": 1.0}) for _ in range(2))
    assert first == second


def test_flatten_metrics_leaves_out_what_could_not_be_computed() -> None:
    flat = flatten_metrics(make_report({"orpo": 0.9, "base": 0.2}))
    assert flat["orpo.top_1"] == pytest.approx(0.9, abs=0.15)
    assert all(isinstance(value, float) for value in flat.values())


@pytest.mark.parametrize(
    "rule",
    [
        GateRule(metric="no_such_metric", at_least=0.0),
        GateRule(metric="top_1", system="no-such-system", at_least=0.0),
        GateRule(metric="top_1", over="no-such-system", at_least=0.0),
        GateRule(metric="nothing", at_least=0.0),
    ],
)
def test_gate_with_a_missing_metric_system_or_number_fails(rule: GateRule) -> None:
    measured: Any = {"orpo": [{"top_1": measure_mean(np.ones(5)), "nothing": measure_mean(np.full(5, np.nan))}]}
    gate = decide_gate([rule], "orpo", measured, list("abcde"), RESAMPLING)
    assert not gate.passed
    assert gate.rules[0].observed is None


def test_gate_without_a_rule_is_not_passed() -> None:
    assert not decide_gate([], "orpo", {"orpo": [{}]}, ["a", "b"], RESAMPLING).passed


def test_gate_on_the_lower_bound_is_stricter_than_on_the_value() -> None:
    measured: Any = {"orpo": [{"top_1": measure_mean(np.arange(40) % 2 * 1.0)}]}
    rules = [GateRule(metric="top_1", at_least=0.5, bound=bound) for bound in ("value", "lower")]
    gate = decide_gate(rules, "orpo", measured, [str(number) for number in range(40)], RESAMPLING)
    assert [rule.passed for rule in gate.rules] == [True, False]
    assert not gate.passed


def test_compare_systems_uses_a_sign_test_only_for_whole_hits() -> None:
    groups = [str(number) for number in range(20)]
    measured: dict[str, list[dict[str, Measurement]]] = {
        "orpo": [{"top_1": measure_mean(np.ones(20))}],
        "base": [{"top_1": measure_mean(np.zeros(20))}],
        "chance": [{"top_1": measure_mean(np.full(20, 0.1))}],
    }
    found = {item.other: item for item in compare_systems("orpo", {"top_1": "sign"}, measured, groups, RESAMPLING)}
    assert (found["base"].test, found["chance"].test) == ("sign", "permutation")
    assert found["base"].p_adjusted == pytest.approx(2 * found["base"].p_value)


def test_slices_leave_out_cases_without_a_value() -> None:
    measured: Any = {"orpo": [{"top_1": measure_mean(np.array([1.0, 0.0, 1.0]))}]}
    found = estimate_slices({"sex": ["female", None, "female"]}, ["top_1"], measured, list("abc"), RESAMPLING)
    assert found["sex"]["female"]["orpo"]["top_1"].value == 1.0


def test_student_config_is_the_one_the_recipe_copies() -> None:
    assert make_config().student == StudentConfig(model="tiny")
