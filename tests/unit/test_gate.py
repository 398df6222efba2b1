"""The data gate's checks of rows, similarity, classes and lengths, each on data that break one rule."""

import dataclasses
import io
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from mint_lib.gate.class_checks import permute_shares
from mint_lib.gate.image_sketches import find_similar_images, sketch_image
from mint_lib.gate.judge import judge_data
from mint_lib.gate.material import GateMaterial
from mint_lib.gate.report import CheckOutcome, GateReport, decide
from mint_lib.gate.settings import GateConfig, SimilarityConfig
from mint_lib.gate.text_sketches import find_text_candidates, list_shingles, measure_jaccard, sign_texts
from mint_lib.records import Case, Label, PreferencePair, Split, Turn

LABELS = tuple(Label(id=f"D:{number}", name=f"Disease {number}") for number in range(4))
SIZES: dict[Split, int] = {"train": 60, "validation": 16, "test": 16}
STARTS: dict[Split, int] = {"train": 0, "validation": 100, "test": 200}
Rows = dict[Split, list[Case]]
Pairs = dict[Split, list[PreferencePair]]


def write_note(number: int) -> str:
    rng = np.random.default_rng([9, number])
    return " ".join("".join(chr(97 + letter) for letter in rng.integers(26, size=6)) for _ in range(20))


def make_case(number: int, **changes: Any) -> Case:
    values: dict[str, Any] = {
        "case_id": f"case-{number}",
        "group_id": f"patient-{number}",
        "text": write_note(number),
        "label_id": LABELS[number % 4].id,
        "source": "clinic",
        "synthetic": True,
    }
    return Case(**values | changes)


def make_rows() -> Rows:
    return {split: [make_case(STARTS[split] + index) for index in range(size)] for split, size in SIZES.items()}


def make_pair(case: Case, **changes: Any) -> PreferencePair:
    place = next(index for index, label in enumerate(LABELS) if label.id == case.label_id)
    other = LABELS[(place + 1) % 4]
    values: dict[str, Any] = {
        "case_id": case.case_id,
        "prompt": (Turn(role="user", content=case.text or ""),),
        "chosen": LABELS[place].name,
        "rejected": other.name,
        "chosen_label_ids": (LABELS[place].id,),
        "rejected_label_ids": (other.id,),
        "teacher_digest": "sha256:teacher",
        "template_digest": "sha256:template",
        "policy": "top1-bottom1",
    }
    return PreferencePair(**values | changes)


def make_pairs(rows: Rows) -> Pairs:
    return {split: [make_pair(case) for case in rows[split]] for split in ("train", "validation")}


def make_material(rows: Rows | None = None, pairs: Pairs | None = None, **changes: Any) -> GateMaterial:
    rows = make_rows() if rows is None else rows
    values: dict[str, Any] = {
        "name": "cases",
        "labels": LABELS,
        "cases": lambda split: iter(rows[split]),
        "reads": "text",
    }
    if pairs is not None:
        rng = np.random.default_rng(0)
        values["pairs"] = lambda split: iter(pairs.get(split, []))
        values["lengths"] = {
            split: np.stack([np.full(len(found), 40), *rng.integers(4, 8, size=(2, len(found)))], axis=1)
            for split, found in pairs.items()
        }
    return GateMaterial(**values | changes)


def judge(material: GateMaterial, **changes: Any) -> GateReport:
    return judge_data(GateConfig.model_validate(changes), material)


def outcome_of(report: GateReport, check: str) -> CheckOutcome:
    return next(outcome for outcome in report.outcomes if outcome.check == check)


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def draw_image(number: int, side: int = 64) -> Image.Image:
    pixels = np.random.default_rng([4, number]).integers(0, 256, size=(8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)


def picture_rows() -> Rows:
    return {
        split: [case.model_copy(update={"image": encode(draw_image(STARTS[split] + i))}) for i, case in enumerate(rows)]
        for split, rows in make_rows().items()
    }


def test_gate_clean_cases_and_pairs_pass() -> None:
    rows = make_rows()
    for material in (make_material(rows), make_material(rows, make_pairs(rows))):
        report = judge(material)
        assert report.passed, report.refusals
        assert GateReport.model_validate(json.loads(report.model_dump_json())) == report
    assert report.statistics.num_pairs == {"train": 60, "validation": 16}
    assert report.statistics.label_counts == {label.id: 15 for label in LABELS}


def test_gate_report_holds_no_text_of_a_case() -> None:
    rows = make_rows()
    rows["test"][0] = rows["test"][0].model_copy(update={"text": rows["train"][0].text})
    shown = judge(make_material(rows, make_pairs(rows))).model_dump_json()
    assert not any(word in shown for word in (rows["train"][0].text or "").split())


@pytest.mark.parametrize("measured", [None, float("nan"), float("inf")])
def test_decide_without_a_number_refuses(measured: float | None) -> None:
    outcome = decide("check", "Check", measured, 1.0, "Found.")
    assert not outcome.passed
    assert outcome.measured is None
    assert decide("check", "Check", measured, None, "Found.").status == "off"


@pytest.mark.parametrize(("value", "bound", "passed"), [(0.2, "at_most", True), (0.2, "at_least", False)])
def test_decide_compares_in_the_direction_of_its_bound(value: float, bound: Any, passed: bool) -> None:
    assert decide("check", "Check", value, 0.3, "Found.", bound=bound).passed is passed


def break_schema(rows: Rows, pairs: Pairs) -> None:
    pairs["train"][0] = pairs["train"][0].model_copy(update={"case_id": "nobody"})


def break_split(rows: Rows, pairs: Pairs) -> None:
    pairs["train"][0] = make_pair(rows["validation"][0])


def break_label(rows: Rows, pairs: Pairs) -> None:
    pairs["train"][3] = pairs["train"][3].model_copy(update={"rejected_label_ids": ("D:99",)})


def break_case_label(rows: Rows, pairs: Pairs) -> None:
    rows["train"][3] = rows["train"][3].model_copy(update={"label_id": "D:99"})


def repeat_case_id(rows: Rows, pairs: Pairs) -> None:
    rows["train"].append(make_case(500, case_id="case-1", group_id="patient-1"))


def empty_answer(rows: Rows, pairs: Pairs) -> None:
    pairs["train"][5] = pairs["train"][5].model_copy(update={"rejected": " \n"})


def empty_prompt(rows: Rows, pairs: Pairs) -> None:
    pairs["train"][5] = pairs["train"][5].model_copy(update={"prompt": (Turn(role="user", content=" "),)})


def equal_sides(rows: Rows, pairs: Pairs) -> None:
    pairs["train"][7] = pairs["train"][7].model_copy(update={"rejected": "  disease   3", "chosen": "Disease 3"})


def repeat_pair(rows: Rows, pairs: Pairs) -> None:
    pairs["validation"][0] = pairs["validation"][1]


def near_duplicates(rows: Rows, pairs: Pairs) -> None:
    for index in range(0, 6, 2):
        rows["train"][index + 1] = rows["train"][index + 1].model_copy(
            update={"text": (rows["train"][index].text or "") + " again"}
        )


def leak_text(rows: Rows, pairs: Pairs) -> None:
    text = (rows["train"][9].text or "").upper().replace(" ", "  ")
    rows["test"][2] = rows["test"][2].model_copy(update={"text": text})


def share_patient(rows: Rows, pairs: Pairs) -> None:
    rows["test"][2] = rows["test"][2].model_copy(update={"group_id": "patient-9"})


def reject_truth(rows: Rows, pairs: Pairs) -> None:
    for index in range(20):
        pair = pairs["train"][index]
        pairs["train"][index] = pair.model_copy(
            update={
                "chosen": pair.rejected,
                "rejected": pair.chosen,
                "chosen_label_ids": pair.rejected_label_ids,
                "rejected_label_ids": pair.chosen_label_ids,
            }
        )


def drop_classes(rows: Rows, pairs: Pairs) -> None:
    pairs["train"] = [
        pair.model_copy(
            update={
                "chosen_label_ids": ("D:0",),
                "chosen": "Disease 0",
                "rejected_label_ids": ("D:2",),
                "rejected": "Disease 2",
            }
        )
        if index
        else pair
        for index, pair in enumerate(pairs["train"])
    ]


@pytest.mark.parametrize(
    ("fault", "check", "named"),
    [
        (break_schema, "schema", "nobody"),
        (break_split, "schema", "case-100"),
        (break_label, "schema", "case-3"),
        (break_case_label, "schema", "case-3"),
        (repeat_case_id, "schema", "case-1"),
        (empty_answer, "empty_pairs", "case-5"),
        (empty_prompt, "empty_pairs", "case-5"),
        (equal_sides, "equal_sides", "case-7"),
        (repeat_pair, "duplicate_pairs", "case-101"),
        (near_duplicates, "near_duplicate_texts", "case-2"),
        (leak_text, "leaked_texts", "case-202"),
        (share_patient, "shared_patients", "case-202"),
        (reject_truth, "truth_rejected", "case-0"),
    ],
)
def test_gate_fault_in_pairs_is_refused_and_named(fault: Any, check: str, named: str) -> None:
    rows = make_rows()
    pairs = make_pairs(rows)
    fault(rows, pairs)
    report = judge(make_material(rows, pairs))
    outcome = outcome_of(report, check)
    assert not report.passed
    assert outcome.status == "refused"
    assert named in outcome.case_ids


def test_gate_one_class_for_almost_all_refuses_and_names_the_balance() -> None:
    rows = make_rows()
    pairs = make_pairs(rows)
    drop_classes(rows, pairs)
    outcome = outcome_of(
        judge(make_material(rows, pairs), class_balance={"min_effective_share": 0.5}), "effective_classes"
    )
    assert outcome.status == "refused"
    assert outcome.measured == pytest.approx(np.exp(0) / 4, abs=0.01)


@pytest.mark.parametrize(
    ("key", "check"),
    [("max_leaked_share", "leaked_texts"), ("max_invalid_share", "schema"), ("max_shared_patients", "shared_patients")],
)
def test_gate_null_threshold_switches_a_check_off(key: str, check: str) -> None:
    rows = make_rows()
    rows["test"][0] = rows["train"][0]
    assert outcome_of(judge(make_material(rows)), check).status == "refused"
    assert outcome_of(judge(make_material(rows), **{key: None}), check).status == "off"


def test_gate_settings_unknown_key_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_leaked"):
        GateConfig.model_validate({"max_leaked": 0})


def test_gate_row_that_cannot_be_read_refuses_without_raising() -> None:
    rows = make_rows()

    def read(split: Split) -> Iterator[Case]:
        yield from rows[split][:10]
        yield Case.model_validate({"case_id": 1})

    outcome = outcome_of(judge(dataclasses.replace(make_material(rows), cases=read)), "schema")
    assert outcome.status == "refused"
    assert outcome.counts["row that cannot be read"] == 3


def test_gate_without_any_row_refuses() -> None:
    report = judge(make_material({"train": [], "validation": [], "test": []}))
    assert outcome_of(report, "schema").status == "refused"
    assert outcome_of(report, "shared_patients").status == "refused"


@pytest.mark.parametrize(
    "lengths",
    [{}, {"train": np.full((60, 3), np.nan), "validation": np.full((16, 3), 5.0)}, {"train": np.full((59, 3), 5)}],
    ids=["missing", "not a number", "too few"],
)
def test_gate_lengths_that_are_missing_or_nan_refuse(lengths: dict[Split, np.ndarray]) -> None:
    rows = make_rows()
    report = judge(make_material(rows, make_pairs(rows), lengths=lengths))
    for check in ("lost_spans", "length_difference", "longer_side"):
        assert outcome_of(report, check).status == "refused"
        assert outcome_of(report, check).measured is None


def test_gate_answer_of_one_token_is_a_lost_span() -> None:
    rows = make_rows()
    material = make_material(rows, make_pairs(rows))
    material.lengths["train"][3, 2] = 1
    outcome = outcome_of(judge(material), "lost_spans")
    assert outcome.status == "refused"
    assert outcome.case_ids == ("case-3",)


def test_gate_refused_cases_count_against_their_threshold() -> None:
    rows = make_rows()
    material = make_material(rows, make_pairs(rows), refused={"train": {"longer_than_window": 10}})
    outcome = outcome_of(judge(material), "refused_cases")
    assert outcome.status == "refused"
    assert outcome.measured == pytest.approx(10 / 86)
    assert outcome_of(judge(material, max_refused_share=0.2), "refused_cases").passed


def biased_material(num_rejected_names: int, chosen: Sequence[int]) -> GateMaterial:
    rows = make_rows()
    names = tuple(label.id for label in LABELS[1 : 1 + num_rejected_names])
    pairs: Pairs = {
        split: [
            make_pair(case).model_copy(update={"chosen_label_ids": ("D:0",), "rejected_label_ids": names})
            for case in rows[split]
        ]
        for split in ("train", "validation")
    }
    rng = np.random.default_rng(1)
    lengths = {
        split: np.stack(
            [
                np.full(len(found), 40),
                1 + rng.integers(*chosen, size=len(found)),
                1 + rng.integers(4, 8, size=len(found)) * num_rejected_names,
            ],
            axis=1,
        )
        for split, found in pairs.items()
    }
    return make_material(rows, pairs, lengths=lengths)


def test_gate_longer_chosen_answers_refuse_with_the_effect_size() -> None:
    report = judge(biased_material(1, (6, 10)))
    outcome = outcome_of(report, "length_difference")
    assert outcome.status == "refused"
    # Two uniform draws of 4 values have a deviation of sqrt(15 / 12); the means differ by 2.
    assert outcome.figures["difference"] == pytest.approx(2 / np.sqrt(15 / 12), abs=0.35)
    assert outcome_of(report, "longer_side").status == "refused"


def test_gate_more_names_on_one_side_are_no_length_bias_unless_asked() -> None:
    material = biased_material(3, (4, 8))
    assert outcome_of(judge(material), "length_difference").passed
    assert not outcome_of(judge(material, length_bias={"unit": "answer"}), "length_difference").passed


def test_gate_few_cases_do_not_alarm_by_chance() -> None:
    rows: Rows = {split: found[:4] for split, found in make_rows().items()}
    material = make_material(rows, make_pairs(rows))
    material.lengths["train"][:, 1] = (5, 7, 4, 6)
    material.lengths["train"][:, 2] = (4, 6, 5, 5)
    assert outcome_of(judge(material), "length_difference").passed
    assert outcome_of(judge(material), "longer_side").passed


def test_gate_class_shift_is_told_from_chance() -> None:
    rows = make_rows()
    before = judge(make_material(rows))
    same = outcome_of(judge(make_material(rows, previous=before)), "class_shift")
    assert same.passed
    for index in range(0, 40):
        rows["train"][index] = rows["train"][index].model_copy(update={"label_id": "D:0"})
    shifted = outcome_of(judge(make_material(rows, previous=before)), "class_shift")
    assert shifted.status == "refused"
    assert shifted.measured == pytest.approx(shifted.figures["total variation distance"] or 0)
    few = {**before.statistics.label_counts, "D:0": 18}
    near = before.model_copy(update={"statistics": before.statistics.model_copy(update={"label_counts": few})})
    assert outcome_of(judge(make_material(previous=near)), "class_shift").passed


def test_permute_shares_agrees_with_the_exact_test_of_two_by_two() -> None:
    from scipy.stats import fisher_exact

    table = np.array([[12, 5], [6, 14]])
    observed = abs(12 / 17 - 6 / 20)
    # 2,000 draws: standard error of 0.004 at p = 0.02.
    assert permute_shares(table, observed) == pytest.approx(fisher_exact(table).pvalue, abs=0.015)


def test_gate_shuffled_teacher_is_reported_when_contradiction_is_allowed() -> None:
    rows = make_rows()
    pairs = make_pairs(rows)
    reject_truth(rows, pairs)
    outcome = outcome_of(judge(make_material(rows, pairs), allow_contradiction=True), "truth_rejected")
    assert outcome.status == "reported"
    assert outcome.passed
    assert outcome.counts["found"] == 20


def test_gate_few_labels_and_captions_can_be_judged() -> None:
    rows: Rows = {
        split: [case.model_copy(update={"label_id": None}) if split == "train" else case for case in found]
        for split, found in make_rows().items()
    }
    assert judge(make_material(rows)).passed
    pairs: Pairs = {
        split: [
            make_pair(make_case(STARTS[split] + index)).model_copy(
                update={
                    "chosen": case.text,
                    "rejected": rows[split][index - 1].text,
                    "chosen_label_ids": (),
                    "rejected_label_ids": (),
                }
            )
            for index, case in enumerate(rows[split])
        ]
        for split in ("train", "validation")
    }
    report = judge(make_material(rows, pairs))
    assert report.passed, report.refusals
    assert outcome_of(report, "truth_rejected").status == "not_applicable"
    assert outcome_of(report, "length_difference").status == "passed"


def test_gate_second_visit_of_a_patient_is_no_duplicate() -> None:
    rows = make_rows()
    for index in range(10):
        rows["train"].append(rows["train"][index].model_copy(update={"case_id": f"visit-{index}"}))
    outcome = outcome_of(judge(make_material(rows)), "near_duplicate_texts")
    assert outcome.passed
    assert outcome.counts["of the same patient"] == 20


def test_text_candidates_hold_every_near_duplicate_that_brute_force_finds() -> None:
    rng = np.random.default_rng(3)
    texts = [write_note(number) for number in range(150)]
    for number in range(50):
        words = texts[number].split()
        words[int(rng.integers(20))] = "changed"
        texts.append(" ".join(words))
    pairs = {tuple(pair) for pair in find_text_candidates(sign_texts(texts), 0.68).tolist()}
    alike = {(i, j) for i in range(200) for j in range(i + 1, 200) if measure_jaccard(texts[i], texts[j]) >= 0.8}
    # One changed word leaves 0.83 to 0.9 in common, which 16 bands of 8 miss once in fifty or less.
    assert len(alike) >= 45
    assert len(alike - pairs) <= 3
    assert list_shingles("A  b\n") == {"a b"}


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda data: data[: len(data) // 2], "undecodable_images"),
        (lambda data: b"GIF89a" + data, "undecodable_images"),
        (lambda data: encode(Image.new("RGB", (5000, 4000), (9, 9, 9))), "oversized_images"),
        (lambda data: encode(Image.new("RGB", (64, 64), (120, 130, 140))), "blank_images"),
    ],
    ids=["cut", "other format", "bomb", "blank"],
)
def test_gate_bad_image_is_refused_and_named(spoil: Any, check: str) -> None:
    rows = picture_rows()
    rows["train"][4] = rows["train"][4].model_copy(update={"image": spoil(rows["train"][4].image)})
    report = judge(make_material(rows, reads="image"), label_flips=None, trigger=None)
    assert [outcome.check for outcome in report.refusals] == [check]
    assert outcome_of(report, check).case_ids == ("case-4",)


def test_gate_oversized_image_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("1", (20_000, 20_000)))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    assert sketch_image(data, 16_777_216).fault == "too large"


def test_gate_recompressed_image_in_test_is_a_leak() -> None:
    rows = picture_rows()
    image = draw_image(0).resize((96, 96), Image.Resampling.BILINEAR)
    rows["test"][1] = rows["test"][1].model_copy(update={"image": encode(image, "JPEG", quality=60)})
    report = judge(make_material(rows, reads="image"), label_flips=None, trigger=None)
    assert [outcome.check for outcome in report.refusals] == ["leaked_images"]
    assert set(outcome_of(report, "leaked_images").case_ids) == {"case-0", "case-201"}


def test_gate_image_student_without_images_refuses() -> None:
    assert outcome_of(judge(make_material(reads="image")), "undecodable_images").status == "refused"


def test_similar_images_agree_with_brute_force() -> None:
    images = [draw_image(number) for number in range(60)]
    copies = [encode(image, "JPEG", quality=70) for image in images[:20]]
    sketches = [sketch_image(data, 10**6) for data in [*map(encode, images), *copies]]
    found = {tuple(pair) for pair in find_similar_images(sketches, SimilarityConfig()).tolist()}
    assert found == {(number, 60 + number) for number in range(20)}
