"""Alignment for real: a Ray Train worker, an S3 server, and what the run leaves and says.

Runs that are disturbed are in test_alignment_faults.
"""

import contextlib
import io
import json

import pytest
from faulty_alignment import list_run_files
from tiny_preferences import add_passed_gate

from mint_lib.alignment import align_student
from mint_lib.errors import GateFailed, InvalidInput, PromptTooLong
from mint_lib.reading import TextReader
from mint_lib.records import Label, PreferencePair, Reference, StageRecord
from mint_lib.rows import pair_schema
from mint_lib.student import StudentConfig, load_student, load_tokenizer, rank_labels, student_digest
from mint_lib.template import Template
from mint_lib.training import on_ray
from mint_lib.training.adapter import LoraConfig
from mint_lib.training.settings import AlignmentConfig

TEMPLATE = Template.load("rare_disease").with_num_answers(1)
LABELS = [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(["Noonan", "Kabuki", "Marfan"])]
SIGNS = ["short stature", "long eyelashes", "tall stature"]


def make_pairs(first_case, num_cases):
    return [
        PreferencePair(
            case_id=f"case-{case}",
            prompt=TEMPLATE.prompt(f"Child of {case} years, {SIGNS[case % 3]}."),
            chosen=TEMPLATE.answer([LABELS[case % 3].name]),
            rejected=TEMPLATE.answer([LABELS[other].name]),
            chosen_label_ids=(LABELS[case % 3].id,),
            rejected_label_ids=(LABELS[other].id,),
            teacher_digest="sha256:0",
            template_digest=TEMPLATE.digest,
            policy="test",
        )
        for case in range(first_case, first_case + num_cases)
        for other in range(3)
        if other != case % 3
    ]


def write_preferences(store, *, train, validation):
    with store.write("preferences", "test") as version:
        version.add_rows("train", train, pair_schema())
        version.add_rows("validation", validation, pair_schema())
        version.add_json("labels.json", [label.model_dump(mode="json") for label in LABELS])
        version.add_bytes("template.yaml", TEMPLATE.data)
        add_passed_gate(version)
        return version.commit(StageRecord(stage="preferences", config={}, inputs={}, code_version="test"))


@pytest.fixture
def preferences(store):
    return write_preferences(store, train=make_pairs(0, 24), validation=make_pairs(24, 9))


def config_of(**values):
    defaults = {
        "name": "test",
        "seed": 1,
        "student": StudentConfig(model="tiny"),
        "method_config": {"nll": "answer"},
        "learning_rate": 1e-2,
        "epochs": 6,
        "trees_per_batch": 4,
        "validate_every_steps": 9,
        "checkpoint_every_steps": 4,
        "early_stop_patience": 99,
        "cpus_per_worker": 1,
        "lora": LoraConfig(rank=8),
    }
    return AlignmentConfig(**(defaults | values))


@pytest.fixture(scope="module", autouse=True)
def one_ray_session():
    with on_ray.ray_session(2):
        yield


@pytest.fixture(scope="module")
def unbroken(s3_store):
    """A run that nothing disturbed: its store, its preferences, the student, and what it printed."""
    store = s3_store()
    preferences = write_preferences(store, train=make_pairs(0, 24), validation=make_pairs(24, 9))
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("MINT_PROGRESS", "json")
        student = align_student(config_of(), store=store, preferences=preferences)
    return store, preferences, student, printed.getvalue()


def test_alignment_writes_a_student_that_others_can_use(unbroken, tmp_path):
    store, preferences, reference, _ = unbroken
    record = store.record(reference)
    assert record.metrics["best_agreement_mrr"] >= record.metrics["start_agreement_mrr"]
    assert record.inputs == {"preferences": str(preferences)}
    assert (record.counts["num_train_cases"], record.counts["num_train_pairs"]) == (24, 48)
    about = store.read_json(reference, "student.json")
    assert StudentConfig.model_validate(about["student"]) == config_of().student
    assert about["base_digest"] == student_digest(config_of().student)
    assert about["template_digest"] == TEMPLATE.digest
    assert about["num_trainable_parameters"] == record.counts["num_trainable_parameters"] > 0
    assert Template.from_bytes(store.read_bytes(reference, "template.yaml")).digest == TEMPLATE.digest
    kinds = {row["kind"] for row in store.read_json(reference, "history.json")}
    assert kinds == {"train", "validation"}
    assert list_run_files(store) == [], "a finished run leaves no working files"

    store.download(reference, tmp_path, "adapter")
    student = load_student(config_of().student, tmp_path / "adapter")
    pairs = make_pairs(24, 9)[::2]
    scores = rank_labels(
        student, TextReader(load_tokenizer(config_of().student)), TEMPLATE, LABELS, [pair.prompt for pair in pairs]
    )
    hits = [LABELS[best].id == pair.chosen_label_ids[0] for best, pair in zip(scores.argmax(1), pairs, strict=True)]
    assert sum(hits) / len(hits) == pytest.approx(record.metrics["best_agreement_top_1"])


def test_alignment_progress_reaches_the_drivers_output(unbroken):
    told = [line for line in unbroken[3].splitlines() if "@progress" in line]
    assert all(line.startswith("@progress ") for line in told), "no line carries a worker's prefix"
    all_events = [json.loads(line.removeprefix("@progress ")) for line in told]
    notes = [event["text"] for event in all_events if event["event"] == "note"]
    assert any("parameters" in note and "48 pairs of 24 prompts with 1 worker" in note for note in notes)
    events = [event for event in all_events if event["event"] == "progress"]
    assert [event["done"] for event in events] == sorted(event["done"] for event in events)
    assert (events[-1]["done"], events[-1]["finished"]) == (events[-1]["total"], True)
    assert any("agreement_mrr" in event["figures"] for event in events)


def test_alignment_same_seed_and_pairs_give_the_same_digest(unbroken):
    store, preferences, reference, _ = unbroken
    again = align_student(config_of(), store=store, preferences=preferences)
    assert again.version != reference.version
    assert again.digest == reference.digest


@pytest.mark.parametrize(
    ("train", "validation", "error", "message"),
    [
        (make_pairs(0, 4), [], InvalidInput, "no pair in validation"),
        (
            make_pairs(0, 4),
            make_pairs(4, 3),
            PromptTooLong,
            r"case-0 has \d+ tokens; its longest answer leaves it \d+ of the student's window",
        ),
    ],
)
def test_alignment_bad_preferences_are_refused_and_nothing_is_written(store, train, validation, error, message):
    preferences = write_preferences(store, train=train, validation=validation)
    student = StudentConfig(model="tiny", window_tokens=30)
    with pytest.raises(error, match=message):
        align_student(config_of(student=student), store=store, preferences=preferences)
    assert store.list_versions("student", "test") == []


def test_alignment_on_pairs_that_the_gate_did_not_pass_is_refused(store):
    def write(passed):
        with store.write("preferences", "test") as version:
            version.add_rows("train", make_pairs(0, 4), pair_schema())
            if passed is not None:
                add_passed_gate(version, passed=passed)
            return version.commit(StageRecord(stage="preferences", config={}, inputs={}, code_version="test"))

    with pytest.raises(InvalidInput, match="was not judged by the gate"):
        align_student(config_of(), store=store, preferences=write(None))
    with pytest.raises(GateFailed, match="The gate refused the pairs"):
        align_student(config_of(), store=store, preferences=write(False))
    assert store.list_versions("student", "test") == []


def test_alignment_dead_input_reference_is_named(store, preferences):
    gone = Reference.parse(str(preferences).replace(preferences.version, "v000099"))
    with pytest.raises(OSError, match="v000099"):
        align_student(config_of(max_failures=0), store=store, preferences=gone)
