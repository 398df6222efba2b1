"""The tissue task: what it measures, its words, and free answers to images."""

import types
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score
from tiny_image_students import FAMILIES, make_image, make_student

from mint_lib.evaluation_tasks.tissue_type import TissueType
from mint_lib.packing import collate_trees, pack_tree
from mint_lib.reading import end_of_turn_id
from mint_lib.records import Case, Label, Ranking, Turn
from mint_lib.report_records import Prediction
from mint_lib.reporting import label_ranking
from mint_lib.reporting.exhibits import confuse_all
from mint_lib.reporting.material import Material, draw_validation_cases, select_cases
from mint_lib.reporting.ranking_scores import measure_ranking
from mint_lib.statistics import GroupBootstrap, Measurement, measure_macro_f1
from mint_lib.student import generate_answers
from mint_lib.template import Template

NAMES = ("Breast", "Colon", "Kidney", "Liver", "Lung", "Prostate", "Skin", "Stomach")
LABELS = tuple(Label(id=f"TISSUE:{name.casefold()}", name=name) for name in NAMES)
IDS = tuple(label.id for label in LABELS)
TEMPLATE = Template.load("tissue_brief").with_num_answers(2)


def value_of(measurement: Measurement) -> float | None:
    groups = [str(index) for index in range(len(measurement.columns))]
    return GroupBootstrap(groups, draws=100, seed=0, confidence=0.95).estimate([measurement]).value


def make_case(number: int, **values: Any) -> Case:
    known: dict[str, Any] = {
        "case_id": f"case-{number}",
        "group_id": f"patient-{number // 2}",
        "image": make_image(number, 32, 32),
        "text": "Only the teacher reads this.",
        "label_id": IDS[number % len(IDS)],
        "source": "test",
        "synthetic": True,
    }
    return Case.model_validate(known | values)


def make_prediction(truth: str, first: str, *, system: str = "orpo", **values: Any) -> Prediction:
    ranked = (first, *(key for key in IDS if key != first))
    probabilities = (0.3, *(0.1,) * (len(IDS) - 1))
    known = {"system": system, "case_id": "case", "label_id": truth, "ranked_ids": ranked}
    return Prediction.model_validate(known | {"probabilities": probabilities} | values)


def make_task(num_cases: int = 16, **config: Any) -> TissueType:
    cases = tuple(make_case(number) for number in range(num_cases))
    ranking = {"label_ids": IDS, "probabilities": (0.3, *(0.1,) * 7), "teacher_digest": "sha256:0"}
    material = Material(
        cases=cases,
        labels=LABELS,
        template=TEMPLATE,
        teacher={case.case_id: Ranking(case_id=case.case_id, **ranking) for case in cases},
        top_k=2,
        bottom_q=2,
        label_counts=dict.fromkeys(IDS, 3),
        seed=1,
    )
    return TissueType(TissueType.Config(**config), material)


def draw_answers(num_cases: int = 120, num_present: int = 6) -> list[Prediction]:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, num_present, num_cases)
    answer = np.where(rng.random(num_cases) < 0.5, truth, rng.integers(0, len(IDS), num_cases))
    return [make_prediction(IDS[t], IDS[a]) for t, a in zip(truth, answer, strict=True)]


def test_macro_f1_agrees_with_sklearn_over_the_tissues_that_are_present() -> None:
    rows = draw_answers()
    truth, answer = [row.label_id for row in rows], [row.ranked_ids[0] for row in rows]
    expected = f1_score(truth, answer, labels=sorted(set(truth)), average="macro")
    assert value_of(measure_ranking(rows, tops=(1,))["macro_f1"]) == pytest.approx(expected)


def test_macro_f1_of_every_draw_agrees_with_sklearn_on_the_resampled_cases() -> None:
    rows = draw_answers(40)
    measured = measure_ranking(rows, tops=(1,))["macro_f1"]
    rng = np.random.default_rng(5)
    for _ in range(20):
        drawn = rng.integers(0, 40, 40)
        truth, answer = [rows[i].label_id for i in drawn], [rows[i].ranked_ids[0] for i in drawn]
        expected = f1_score(truth, answer, labels=sorted(set(truth)), average="macro")
        sums = measured.columns[drawn].sum(axis=0, keepdims=True)
        assert measured.statistic(sums)[0] == pytest.approx(expected)


def test_macro_f1_of_equal_probabilities_is_what_answers_by_lot_reach() -> None:
    truth = ["a"] * 60 + ["b"] * 20
    measured = measure_macro_f1([{"a": 0.5, "b": 0.5}] * 80, truth)
    # Half of all cases are answered with either: 2 * 30 / (40 + 60) and 2 * 10 / (40 + 20).
    assert value_of(measured) == pytest.approx((0.6 + 1 / 3) / 2)


def test_task_measures_top_5_of_eight_tissues_and_describes_all_it_measures() -> None:
    task = make_task()
    rows = [make_prediction(str(case.label_id), IDS[0], generated=(IDS[0],)) for case in task.material.cases]
    measured = task.measure(rows)
    assert {"top_1", "top_3", "top_5", "macro_f1", "macro_top_1", "mrr", "coverage", "car", "ece"} <= set(measured)
    assert set(measured) == set(task.metrics)
    assert next(iter(task.metrics)) == "top_1"


def test_task_speaks_of_tissues_and_never_of_diseases() -> None:
    task = make_task(generation_cases=2)
    texts = [item.title + item.meaning for item in task.metrics.values()]
    words = " ".join([*texts, *task.describe(), *task.wording.model_dump().values()]).casefold()
    assert "tissue" in words
    assert not [word for word in ("diagnos", "disease", "photo", "ontolog") if word in words]


def test_task_guesses_chance_with_the_f1_of_chance() -> None:
    task = make_task()
    chance = task.guess()["chance"]
    assert value_of(task.measure(chance)["top_1"]) == pytest.approx(1 / 8)
    assert value_of(task.measure(chance)["macro_f1"]) == pytest.approx(1 / 8)


def test_task_shows_each_case_its_image_and_the_question_and_never_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(generation_cases=3)
    asked: dict[str, Any] = {}

    def rank(*arguments: Any, images: Any, **_: Any) -> Any:
        asked["ranked"] = (arguments[4], images)
        return np.log(np.full((16, 8), 1 / 8))

    def generate(*arguments: Any, images: Any, **_: Any) -> list[str]:
        asked["generated"] = (arguments[2], images)
        return ["MOST_LIKELY_TISSUE:\n1. 'liver'\n2. 'Prostat'\n3. 'Moon'"] * 3

    monkeypatch.setattr(label_ranking, "rank_labels", rank)
    monkeypatch.setattr(label_ranking, "generate_answers", generate)
    monkeypatch.setattr(label_ranking, "encode_answer", lambda *_: [0])
    rows = task.answer(None, types.SimpleNamespace(tokenizer=None), system="orpo")  # type: ignore[arg-type]
    turns, images = asked["ranked"]
    assert images == [(case.image,) for case in task.material.cases]
    assert set(turns) == {TEMPLATE.prompt()}
    assert "teacher" not in str(turns) + str(asked["generated"][0])
    assert len(asked["generated"][1]) == 3
    assert [row.generated for row in rows if row.generated is not None] == [
        ("TISSUE:liver", "fuzzy:TISSUE:prostate", "unknown")
    ] * 3


def test_select_cases_of_images_counts_image_tokens_and_leaves_out_cases_without_one() -> None:
    student = make_student("llava")
    rows = [make_case(0), make_case(1, image=None), make_case(2, label_id=None), make_case(3, label_id="TISSUE:moon")]
    tokens = len(student.reader.read(TEMPLATE.prompt(), [rows[0].image or b""]).ids)
    options: dict[str, Any] = {"max_refused_share": 0.5}
    kept, refused = select_cases(rows, LABELS, TEMPLATE, student.reader, window_tokens=tokens + 200, **options)
    assert [case.case_id for case in kept] == ["case-0"]
    assert refused == {"no_label": ["case-2"], "other_label": ["case-3"], "no_image": ["case-1"]}
    text_tokens = len(student.reader.read(TEMPLATE.prompt()).ids)
    assert text_tokens < tokens
    drawn = {"num_cases": 9, "seed": 0}
    some = draw_validation_cases(rows, LABELS, TEMPLATE, student.reader, window_tokens=tokens + 200, **drawn)
    none = draw_validation_cases(rows, LABELS, TEMPLATE, student.reader, window_tokens=tokens, **drawn)
    assert [case.case_id for case in some] == ["case-0"]
    assert none == []


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_an_image_is_the_greedy_path_of_the_model_on_whole_rows(family: str) -> None:
    import torch

    student = make_student(family)
    prompt, image = (Turn(role="user", content="Name it."),), make_image(1, 32, 32)
    found = generate_answers(student.model, student.reader, [prompt], images=[(image,)], max_new_tokens=3)[0]
    read = student.reader.read(prompt, [image])
    ids: list[int] = []
    for _ in range(3):
        tree = pack_tree([*read.ids, *ids], [[0]])
        batch = collate_trees([tree], pad_token_id=0)
        inputs: dict[str, Any] = {"position_ids": batch["position_ids"]}
        inputs |= student.reader.collate_images([read.image_inputs], [tree], batch)
        with torch.inference_mode():
            ids.append(int(student.model(input_ids=batch["input_ids"], **inputs).logits[0, -1].argmax()))
        if ids[-1] == end_of_turn_id(student.reader.tokenizer):
            break
    assert found == student.reader.tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_depends_on_the_image() -> None:
    student = make_student("llava")
    prompts = [(Turn(role="user", content="Name it."),)] * 6
    images = [(make_image(seed, 32, 32),) for seed in range(6)]
    assert len(set(generate_answers(student.model, student.reader, prompts, images=images, max_new_tokens=4))) > 1


def test_confusion_of_all_tissues_counts_every_case_and_shows_tissues_without_one() -> None:
    rows = draw_answers()
    confusion = confuse_all(rows, LABELS, family="All tissues")
    counts = np.array(confusion.counts)
    assert counts.shape == (8, 8)
    assert counts.sum() == len(rows)
    assert counts[6:].sum() == 0
    assert np.trace(counts) == sum(row.ranked_ids[0] == row.label_id for row in rows)
