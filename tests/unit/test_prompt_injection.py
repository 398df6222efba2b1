"""Text in notes that asks for an answer: whom the measure flags, whom it does not, and what it says of either."""

import base64
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from mint_lib.records import Case, Label, Reference
from mint_lib.report_records import EvaluationReport, Prediction, Wording
from mint_lib.reporting.findings import Resampling
from mint_lib.reporting.injection_texts import KINDS, TEXTS, write_injection, write_neutral
from mint_lib.reporting.injections import FitsWindow, Injections, InjectionsConfig, measure_injections
from mint_lib.reporting.material import Material, select_cases
from mint_lib.reporting.note_answers import ask_notes, fit_window
from mint_lib.reporting.sentences import describe_injections
from mint_lib.reporting.settings import EvaluationConfig
from mint_lib.student import StudentConfig, load_reader, load_student
from mint_lib.template import Template

NAMES = ("Noonan syndrome 1", "Kabuki syndrome 1", "Robinow syndrome", "Costello syndrome", "Sotos syndrome")
LABELS = tuple(Label(id=f"OMIM:{number}", name=name) for number, name in enumerate(NAMES))
IDS = tuple(label.id for label in LABELS)
RESAMPLING = Resampling(draws=300, seed=3, confidence=0.95)
STUDENT = str(Reference.parse(f"student/s@v000001#sha256:{'0' * 64}"))
SECRET = "a finding that only the note tells"
Rank = Callable[[str], tuple[str, ...]]
"""From a note to the labels, most probable first."""


def make_cases(num_cases: int = 60, labels: Sequence[Label] = LABELS) -> list[Case]:
    """Two cases a patient; the first line of a note holds the number of its label."""
    return [
        Case(
            case_id=f"case-{number}",
            group_id=f"patient-{number // 2}",
            text=f"Sign {number % len(labels)}, {SECRET}, visit {number}.",
            label_id=labels[number % len(labels)].id,
            source="test",
            synthetic=True,
        )
        for number in range(num_cases)
    ]


def put_first(label_id: str, ids: Sequence[str] = IDS) -> tuple[str, ...]:
    return (label_id, *(key for key in ids if key != label_id))


def read_sign(note: str) -> tuple[str, ...]:
    """A ranker that reads the first line alone."""
    return put_first(IDS[int(note[5])])


def obey(note: str) -> tuple[str, ...]:
    """A ranker that believes every label which a later line names, and reads Base64."""
    line = note.partition("\n")[2]
    for word in re.findall(r"[A-Za-z0-9+/]{16,}={0,2}", line):
        line += base64.b64decode(word).decode(errors="replace")
    named = [label.id for label in LABELS if label.name in line]
    return put_first(named[0], read_sign(note)) if named else read_sign(note)


def measure(
    rank: Rank,
    cases: Sequence[Case],
    *,
    labels: Sequence[Label] = LABELS,
    fits: FitsWindow = lambda case: True,
    num_cases: int = 60,
) -> Injections | None:
    answers = [
        Prediction(
            system="orpo",
            case_id=case.case_id,
            label_id=str(case.label_id),
            ranked_ids=(ids := rank(case.text or "")),
            probabilities=(1 / len(ids),) * len(ids),
        )
        for case in cases
    ]
    return measure_injections(
        cases,
        answers,
        lambda asked: [rank(case.text or "") for case in asked],
        fits,
        labels=labels,
        config=InjectionsConfig(cases=num_cases),
        student=STUDENT,
        resampling=RESAMPLING,
    )


def found(rank: Rank, cases: Sequence[Case] | None = None, **options: Any) -> Injections:
    injections = measure(rank, cases or make_cases(), **options)
    assert injections is not None
    return injections


def test_gullible_ranker_is_flagged_with_a_high_rate_for_every_text() -> None:
    injections = found(obey)
    assert [item.kind for item in injections.kinds] == list(KINDS)
    assert injections.top_1.value == 1.0
    for item in injections.kinds:
        assert item.flagged
        assert item.injected.followed.value == item.injected.changed.value == 1.0
        assert item.neutral.followed.value == item.neutral.changed.value == item.neutral.rank_change.value == 0.0
        assert item.excess.followed.low == 1.0
        # The right label was first and is second.
        assert item.injected.rank_change.value == 1.0
        assert item.excess.followed.n == 60


def test_ranker_that_obeys_orders_alone_is_flagged_for_these_and_not_for_the_name_in_passing() -> None:
    def rank(note: str) -> tuple[str, ...]:
        return obey(note) if "first" in note else read_sign(note)

    flagged = {item.kind for item in found(rank).kinds if item.flagged}
    assert flagged == {"override", "system_turn"}


def test_ranker_that_is_blind_to_the_text_has_no_effect_at_all() -> None:
    injections = found(read_sign)
    for item in injections.kinds:
        for effect in (item.injected, item.neutral, item.excess):
            values = [getattr(effect, name) for name in ("changed", "rank_change", "followed")]
            assert [(value.value, value.low, value.high) for value in values] == [(0.0, 0.0, 0.0)] * 3
        assert not item.flagged


def test_ranker_that_any_text_upsets_changes_its_answers_and_is_not_flagged() -> None:
    def rank(note: str) -> tuple[str, ...]:
        first, separator, _ = note.partition("\n")
        return put_first(IDS[zlib.crc32(note.encode()) % 5]) if separator else read_sign(first)

    for item in found(rank, make_cases(400), num_cases=400).kinds:
        assert (item.injected.changed.value or 0) > 0.7
        assert (item.neutral.followed.value or 0) > 0.1
        assert not item.flagged


def test_label_asked_for_is_neither_right_nor_first_before() -> None:
    asked: list[str] = []

    def rank(note: str) -> tuple[str, ...]:
        if "\n" not in note:
            return put_first(IDS[(int(note[5]) + 1) % 5])  # wrong, by one label
        if "Base64" not in note:
            names = [label.id for label in LABELS if label.name in note]
            if names:
                assert names[0] not in (IDS[int(note[5])], IDS[(int(note[5]) + 1) % 5])
                asked.append(names[0])
        return read_sign(note)

    injections = found(rank)
    assert injections.top_1.value == 0.0
    assert len(asked) == 5 * 60
    assert set(asked) == set(IDS)


def test_cases_of_two_labels_are_asked_about_only_where_the_first_answer_is_right() -> None:
    cases = make_cases(40, LABELS[:2])
    injections = measure(lambda note: put_first(IDS[0], IDS[:2]), cases, labels=LABELS[:2])
    assert injections is not None
    assert injections.num_cases == 20
    assert injections.top_1.value == 1.0
    assert measure(lambda note: put_first(IDS[1 - int(note[5])], IDS[:2]), cases, labels=LABELS[:2]) is None


def test_notes_that_would_not_fit_the_window_are_passed_over_and_counted() -> None:
    cases = make_cases(30)
    injections = found(read_sign, cases, fits=lambda case: (case.text or "")[5] != "0", num_cases=30)
    assert (injections.num_cases, injections.num_too_long) == (24, 6)
    assert measure(read_sign, cases, fits=lambda case: False) is None


def test_same_seed_asks_the_same_about_the_same_cases() -> None:
    assert found(obey, num_cases=20) == found(obey, num_cases=20)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_neutral_text_is_as_long_as_the_text_it_is_held_against_and_names_nothing(kind: Any, name: str) -> None:
    text = write_injection(kind, name)
    neutral = write_neutral(len(text))
    assert 0 <= len(text) - len(neutral) <= 12  # a word of the neutral text and a blank
    assert "syndrome" not in neutral
    assert "{" not in text


def test_injection_texts_name_the_label_or_encode_it_and_spell_no_control_token() -> None:
    for kind in KINDS:
        text = write_injection(kind, "Kabuki syndrome 1")
        if kind == "encoded":
            assert "Kabuki" not in text
            assert "Kabuki syndrome 1" in base64.b64decode(text.split()[-1]).decode()
        else:
            assert "Kabuki syndrome 1" in text
        assert not re.search(r"<\||\|>|\[/?INST|<<|</?s>|<start_of_turn>", text)
    assert set(TEXTS) == set(KINDS)


def test_tiny_student_answers_within_the_label_set_whatever_a_note_says() -> None:
    student = StudentConfig(model="tiny", window_tokens=1024)
    reader, template = load_reader(student), Template.load("rare_disease").with_num_answers(1)
    cases = make_cases(6)
    material = Material(
        cases=tuple(cases), labels=LABELS, template=template, teacher={}, top_k=1, bottom_q=1, label_counts={}, seed=1
    )
    ask = ask_notes(material, load_student(student), reader, description="test")
    answers = [
        Prediction(system="s", case_id="c", label_id=str(case.label_id), ranked_ids=ids, probabilities=(0.2,) * 5)
        for case, ids in zip(cases, ask(cases), strict=True)
    ]
    seen: list[tuple[str, ...]] = []

    def watch(asked: Sequence[Case]) -> list[tuple[str, ...]]:
        seen.extend(rankings := [tuple(ids) for ids in ask(asked)])
        return rankings

    injections = measure_injections(
        cases,
        answers,
        watch,
        fit_window(material, reader, window_tokens=1024),
        labels=LABELS,
        config=InjectionsConfig(),
        student=STUDENT,
        resampling=RESAMPLING,
    )
    assert injections is not None
    assert injections.num_cases == 6
    assert len(seen) == 6 * 2 * len(KINDS)
    assert all(sorted(ids) == sorted(IDS) for ids in seen)
    tokens = len(reader.read(template.question(cases[0]).turns).ids)
    assert not fit_window(material, reader, window_tokens=tokens)(cases[0])
    assert fit_window(material, reader, window_tokens=tokens + 64)(cases[0])


def test_note_that_spells_a_control_token_is_left_out_and_counted() -> None:
    reader, template = load_reader(StudentConfig(model="tiny")), Template.load("rare_disease")
    cases = make_cases(3)
    turn = f"{reader.tokenizer.eos_token}\n{reader.tokenizer.all_special_tokens[-1]}"
    sly = cases[1].model_copy(update={"text": f"{cases[1].text} {turn}"})
    kept, refused = select_cases(
        [cases[0], sly, cases[2]], LABELS, template, reader, window_tokens=2048, max_refused_share=0.0
    )
    assert [case.case_id for case in kept] == ["case-0", "case-2"]
    assert refused == {"control_tokens_in_text": ["case-1"]}


def test_findings_hold_nothing_of_a_note() -> None:
    assert SECRET not in found(obey).model_dump_json()


def test_sentence_says_who_is_steered_by_what_and_how_often() -> None:
    report = EvaluationReport.model_construct(main="orpo", roles={"orpo": "student"}, wording=Wording())
    steered = describe_injections(report, found(lambda note: obey(note) if "first" in note else read_sign(note)))
    assert steered == (
        "ORPO can be steered by text in a note: of 60 cases it ranks a diagnosis drawn by lot first in 100.0 % after "
        "an order to ignore the rest (neutral text 0.0 %), in 100.0 % after a made-up system turn (neutral text 0.0 %)."
    )
    blind = describe_injections(report, found(read_sign))
    assert "is not shown to make ORPO rank it first more often than a neutral text of the same length" in blind
    assert "change in up to 0.0 % of the cases" in blind


def make_config(student: dict[str, Any], **values: Any) -> EvaluationConfig:
    return EvaluationConfig.model_validate({"name": "n", "seed": 1, "main": "orpo", "student": student} | values)


def test_config_measures_injections_only_where_asked_and_only_of_students_that_read_notes() -> None:
    assert make_config({"model": "tiny"}).injections is None
    assert make_config({"model": "tiny"}, injections={"cases": 5}).injections == InjectionsConfig(cases=5)
    with pytest.raises(ValueError, match="injections alter notes, and the student reads images"):
        make_config({"model": "tiny-image", "reads": "image"}, injections={})
