"""The grounding probe: what it shows, and whom it lets pass."""

import io
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mint_lib.errors import GateFailed, RefusedData
from mint_lib.records import Case, Reference
from mint_lib.registry import check_grounding
from mint_lib.report_records import Grounding, Prediction, Wording
from mint_lib.reporting.altered_images import decode_pixels, encode_pixels, make_flat, mean_colour, shrink
from mint_lib.reporting.findings import Resampling
from mint_lib.reporting.grounding import AskImages, GroundingConfig, Probe, probe_grounding
from mint_lib.reporting.image_answers import ask_images
from mint_lib.reporting.material import Material
from mint_lib.reporting.sentences import describe_grounding
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.template import Template

IDS = ("TISSUE:a", "TISSUE:b", "TISSUE:c", "TISSUE:d")
STUDENT = Reference.parse(f"student/s@v000001#sha256:{'0' * 64}")
RESAMPLING = Resampling(draws=500, seed=3, confidence=0.95)
Answer = Callable[[bytes], str]


def make_cases(num_cases: int = 80, labels: Sequence[str] = IDS) -> list[Case]:
    """Cases of two images a patient. The texture of an image tells its label by the step of its stripes."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(num_cases):
        label = labels[(number // 2) % len(labels)]
        stripes = (np.arange(16) // (IDS.index(label) + 1)) % 2 * 120 + rng.integers(0, 40)
        image = np.broadcast_to(stripes[None, :, None], (16, 16, 3)).astype(np.uint8)
        rows.append(
            Case(
                case_id=f"case-{number}",
                group_id=f"patient-{number // 2}",
                image=encode_pixels(image),
                label_id=label,
                source="test",
                synthetic=True,
            )
        )
    return rows


def read_stripes(data: bytes) -> str:
    """The label that the stripes tell; the first label where there are none."""
    line = decode_pixels(data)[0, :, 0].astype(int)
    steps = np.flatnonzero(np.diff(line))
    return IDS[min(int(steps[0]), 3)] if len(steps) else IDS[0]


def probe(answer: Answer, cases: Sequence[Case], *, num_probed: int = 100, ask: AskImages | None = None) -> Probe:
    rows = [
        Prediction(
            system="orpo",
            case_id=case.case_id,
            label_id=str(case.label_id),
            ranked_ids=(first := answer(case.image or b""), *(key for key in IDS if key != first)),
            probabilities=(0.7, 0.1, 0.1, 0.1),
        )
        for case in cases
    ]
    return probe_grounding(
        cases,
        rows,
        ask or (lambda images: [answer(image) for image in images]),
        config=GroundingConfig(cases=num_probed),
        student=str(STUDENT),
        num_labels=len(IDS),
        resampling=RESAMPLING,
    )


def test_probe_of_a_student_that_reads_the_image_passes_and_shows_that_it_follows_the_image() -> None:
    found = probe(read_stripes, make_cases()).grounding
    assert found.passed
    assert found.top_1.value == 1.0
    variants = {variant.kind: variant for variant in found.variants}
    assert variants["swapped"].top_1.value == 0.0
    assert variants["swapped"].follows is not None
    assert variants["swapped"].follows.value == 1.0
    assert variants["blank"].follows is None
    assert all(variant.changed.low is not None and variant.changed.low > 0 for variant in found.variants)


def test_probe_of_a_constant_answer_fails_every_variant_that_decides() -> None:
    found = probe(lambda _: IDS[1], make_cases()).grounding
    assert not found.passed
    assert [variant.passed for variant in found.variants] == [False, False, False, False, None]
    assert [variant.changed.value for variant in found.variants] == [0.0] * 5


def test_probe_of_a_student_right_by_the_frequency_of_one_label_fails_however_right_it_is() -> None:
    cases = make_cases(labels=(IDS[0],) * 9 + (IDS[1],))
    found = probe(lambda _: IDS[0], cases).grounding
    assert found.top_1.value == pytest.approx(0.9)
    assert found.ceiling == pytest.approx(0.9)
    assert not found.passed


def test_probe_of_answers_by_lot_that_change_with_every_image_fails() -> None:
    found = probe(lambda image: IDS[zlib.crc32(image) % 4], make_cases(200), num_probed=200).grounding
    assert not found.passed


def test_probe_of_a_student_that_is_told_the_label_by_something_else_fails_though_it_gets_worse() -> None:
    cases = make_cases()
    probed = [str(case.label_id) for case in probe(read_stripes, cases).cases]
    found = probe(
        read_stripes,
        cases,
        ask=lambda _: [label if place % 3 else IDS[3] for place, label in enumerate(probed)],
    ).grounding
    for variant in found.variants[:4]:
        assert variant.drop.low is not None
        assert variant.drop.low > 0
        assert variant.changed.low is not None
        assert variant.changed.low > 0
        assert variant.top_1.low is not None
        assert variant.top_1.low > found.ceiling
        assert variant.passed is False
    assert not found.passed


def test_probe_shows_each_variant_as_it_is_described() -> None:
    cases = make_cases(40)
    found = probe(read_stripes, cases, num_probed=30)
    assert len(found.cases) == 30
    assert len(set(found.shown["blank"].images)) == 1
    grey = decode_pixels(found.shown["blank"].images[0])[0, 0]
    assert tuple(grey) == mean_colour(found.own.images)
    assert sorted(found.shown["permuted"].images) == sorted(found.own.images)
    assert all(mine.case_id != other.case_id for mine, other in zip(found.cases, found.donors["permuted"], strict=True))
    assert all(
        mine.label_id != other.label_id for mine, other in zip(found.cases, found.donors["swapped"], strict=True)
    )
    for mine, flat in zip(found.own.images, found.shown["colour"].images, strict=True):
        assert len(np.unique(decode_pixels(flat).reshape(-1, 3), axis=0)) == 1
        np.testing.assert_allclose(decode_pixels(flat).mean(axis=(0, 1)), decode_pixels(mine).mean(axis=(0, 1)), atol=1)
    noise = np.concatenate([decode_pixels(image).ravel() for image in found.shown["noise"].images])
    assert len(set(found.shown["noise"].images)) == 30
    assert noise.mean() == pytest.approx(127.5, abs=2)
    assert noise.std() == pytest.approx(73.9, abs=2)


def test_probe_made_twice_is_the_same() -> None:
    assert probe(read_stripes, make_cases()) == probe(read_stripes, make_cases())


def test_probe_of_cases_of_one_label_refuses() -> None:
    with pytest.raises(RefusedData, match="no image can be swapped"):
        probe(read_stripes, make_cases(labels=IDS[:1]))


def test_probe_of_one_patient_has_no_interval_and_fails() -> None:
    cases = [case.model_copy(update={"group_id": "one"}) for case in make_cases()]
    assert not probe(read_stripes, cases).grounding.passed


def test_flat_image_is_as_large_as_the_image_it_stands_for() -> None:
    file = io.BytesIO()
    Image.new("RGB", (20, 9), "red").save(file, "JPEG")
    assert decode_pixels(make_flat(file.getvalue(), (1, 2, 3))).shape == (9, 20, 3)


def test_shrink_keeps_a_small_image_and_the_shape_of_a_large_one() -> None:
    small = encode_pixels(np.zeros((9, 20, 3), dtype=np.uint8))
    assert shrink(small, longest_pixels=20) is small
    assert decode_pixels(shrink(small, longest_pixels=10)).shape == (4, 10, 3)


def test_registry_takes_an_image_student_only_with_a_passed_probe_of_itself(make_findings: Any) -> None:
    passed = probe(read_stripes, make_cases()).grounding
    failed = probe(lambda _: IDS[0], make_cases()).grounding
    check_grounding(make_findings(passed), STUDENT, reads="image")
    with pytest.raises(GateFailed, match="failed the grounding probe with blank, noise, permuted, swapped"):
        check_grounding(make_findings(failed), STUDENT, reads="image")
    with pytest.raises(GateFailed, match="probed none"):
        check_grounding(make_findings(None), STUDENT, reads="image")
    another = Reference.parse(f"student/s@v000002#sha256:{'1' * 64}")
    with pytest.raises(GateFailed, match="register that one"):
        check_grounding(make_findings(passed), another, reads="image")
    check_grounding(make_findings(None), STUDENT, reads="text")


@pytest.fixture
def make_findings() -> Callable[[Grounding | None], Any]:
    """A function that makes a report with that probe; nothing else of it is looked at."""
    from mint_lib.report_records import EvaluationReport

    return lambda grounding: EvaluationReport.model_construct(grounding=grounding, reads="image")


def test_sentence_says_the_verdict_and_every_number() -> None:
    found = probe(read_stripes, make_cases()).grounding
    text = describe_grounding(found, "ORPO", Wording(label="tissue"))
    assert text.startswith("ORPO looks at the image. Top-1 is 100.0 % with the right images, 25.0 % with a blank image")
    assert "0.0 % with an image of another tissue" in text
    assert "names the tissue of the image shown in 100.0 %" in text
    blind = describe_grounding(probe(lambda _: IDS[0], make_cases()).grounding, "ORPO", Wording(label="tissue"))
    assert blind.startswith(
        "ORPO is not shown to look at the image and cannot be registered (failed with a blank image"
    )


def make_config(student: dict[str, Any], **values: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"name": "n", "seed": 1, "main": "orpo", "student": student} | values)


def test_config_probes_image_students_unless_told_not_to_and_never_text_students() -> None:
    image = {"model": "tiny-image", "reads": "image"}
    assert make_config(image).grounding == GroundingConfig()
    assert make_config(image, grounding=None).grounding is None
    assert make_config({"model": "tiny"}).grounding is None
    assert make_config(image).perturbations is None
    with pytest.raises(ValueError, match="alter images, and the student reads text"):
        make_config({"model": "tiny"}, grounding={})


def test_config_read_back_from_its_own_json_is_the_same() -> None:
    for grounding in ({"grounding": None}, {"grounding": {"cases": 7}}, {}):
        config = make_config({"model": "tiny-image", "reads": "image"}, **grounding)
        assert EvaluationConfig.model_validate(config.model_dump(mode="json")) == config


def test_images_of_cases_are_answered_as_before_without_the_student() -> None:
    cases = make_cases(12)
    rows = [
        Prediction(
            system="orpo",
            case_id=case.case_id,
            label_id=str(case.label_id),
            ranked_ids=(IDS[number % 4], *(key for key in IDS if key != IDS[number % 4])),
            probabilities=(0.7, 0.1, 0.1, 0.1),
        )
        for number, case in enumerate(cases)
    ]
    material = Material(
        cases=tuple(cases),
        labels=(),
        template=Template.load("tissue_brief"),
        teacher={},
        top_k=1,
        bottom_q=1,
        label_counts={},
        seed=1,
    )
    nobody: Any = None
    ask = ask_images(material, nobody, nobody, rows, description="test")
    assert ask([case.image or b"" for case in reversed(cases)]) == [IDS[number % 4] for number in reversed(range(12))]
