"""The vision application as a user runs it: `mint run` on a tiny recipe with images, on a real S3 server and Ray."""

import os
import pathlib
import subprocess
import sys

import pytest

from mint_lib.records import Case, PreferencePair, Reference
from mint_lib.report_records import EvaluationReport

RECIPE = pathlib.Path(__file__).parent / "recipes" / "tiny_vision.yaml"


@pytest.fixture(scope="module")
def store(s3_store):
    return s3_store()


@pytest.fixture(scope="module")
def done(store, tmp_path_factory):
    """The run. It ends at the registry: a student of random weights does not look at the image."""
    environment = {**os.environ, "MINT_S3_PREFIX": store.settings.prefix}
    command = [sys.executable, "-m", "pipelines.cli", "run", str(RECIPE)]
    folder = tmp_path_factory.mktemp("vision")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=550)


def test_student_that_does_not_look_at_the_image_is_measured_and_not_registered(done, store):
    report = EvaluationReport.model_validate(store.read_json(store.resolve("report/tiny-vision"), "report.json"))
    assert report.grounding is not None
    assert not report.grounding.passed
    assert {"orpo", "captioning", "base", "teacher", "colour", "majority"} <= set(report.systems)
    assert done.returncode == 1
    assert "registry: GateFailed" in done.stderr
    assert "Traceback" not in done.stderr
    assert store.list_names("model") == []


def test_aligned_student_starts_from_the_one_that_learned_to_describe(done, store):
    captioned = store.resolve("student/tiny-vision-captioning")
    aligned = store.record(store.resolve("student/tiny-vision-orpo"))
    assert aligned.inputs["start"] == str(captioned)
    described = Reference.parse(store.record(captioned).inputs["preferences"])
    assert store.record(described).config["pairs"] == "captions"


def test_questions_hold_the_tile_and_nothing_that_the_teacher_read(done, store):
    cases = {case.case_id: case for case in store.read_rows(store.resolve("cases/tiny-vision"), "train", Case)}
    pairs = store.read_rows(store.resolve("preferences/tiny-vision"), "train", PreferencePair)
    assert len({pair.prompt for pair in pairs}) == 1
    assert all(pair.images == (cases[pair.case_id].image,) for pair in pairs)
    assert all(case.synthetic and case.text for case in cases.values())
