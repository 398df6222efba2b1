"""The whole flow as a user runs it: `mint run` on a tiny recipe against a real S3 server, under kfp.local and Ray."""

import json
import os
import pathlib
import re
import subprocess
import sys

import psutil
import pytest
import yaml

from mint_lib.records import SPLITS
from mint_lib.report_records import EvaluationReport
from mint_lib.store import Store

RECIPE = pathlib.Path(__file__).parent / "recipes" / "tiny.yaml"


def mint(
    folder: pathlib.Path, *arguments: str, seconds: int = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=seconds
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("flow")


@pytest.fixture(scope="module")
def store(s3_store):
    store = s3_store()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINT_S3_PREFIX", store.settings.prefix)
        yield store


def _num_versions(store: Store) -> int:
    kinds = ("cases", "rankings", "preferences", "student", "report", "model")
    return sum(len(store.list_versions(kind, name)) for kind in kinds for name in store.list_names(kind))


def test_run_that_fails_at_a_stage_keeps_the_stages_before_it(folder, store):
    done = mint(folder, "run", str(RECIPE), "--set", "preferences.bottom_q=5")
    assert done.returncode == 1
    assert "preferences: InvalidInput" in done.stderr
    assert "Traceback" not in done.stderr
    assert store.list_names("preferences") == []
    assert len(store.list_versions("cases", "tiny")) == len(store.list_versions("rankings", "tiny")) == 1


def test_run_goes_on_where_it_failed_and_ends_with_the_numbers(folder, store):
    done = mint(folder, "run", str(RECIPE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cached  data" in done.stdout
    assert "cached  teacher" in done.stdout
    assert len(store.list_versions("cases", "tiny")) == len(store.list_versions("rankings", "tiny")) == 1
    report = EvaluationReport.model_validate(store.read_json(store.resolve("report/tiny"), "report.json"))
    assert {"orpo", "sft", "base", "teacher"} <= set(report.systems)
    for word in ["report ", "student ", str(store.resolve("model/tiny"))]:
        assert word in done.stdout
    html = next((folder / ".mint" / "reports").glob("tiny-*.html")).read_bytes()
    assert html == store.read_bytes(store.resolve("report/tiny"), "report.html")


def run_until(folder: pathlib.Path, sign: str) -> tuple[int, str]:
    """Run the recipe for long, send SIGTERM at the first line that holds `sign`: the exit code and all that was told.

    Whatever the run had started is gone by then.
    """
    changes = ("name=stopped", "alignment.epochs=500", "alignment.early_stop_patience=999")
    command = [sys.executable, "-m", "pipelines.cli", "run", str(RECIPE)]
    process = subprocess.Popen(
        [*command, *(part for change in changes for part in ("--set", change))],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed: list[str] = []
    descendants: list[psutil.Process] = []
    for line in process.stdout:
        printed.append(line)
        if sign in line and not descendants:
            descendants = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
    code = process.wait()
    assert len(descendants) > 2  # Kubeflow's shell, the step, and Ray
    assert psutil.wait_procs(descendants, timeout=30)[1] == []
    return code, "".join(printed)


def test_run_told_to_stop_ends_its_step_with_a_checkpoint_and_leaves_no_process(folder, store):
    code, printed = run_until(folder, "alignment: stopped-")
    assert code == os.EX_TEMPFAIL, printed
    assert "Traceback" not in printed
    assert "told to stop" in printed
    assert "run the same command again to go on" in printed
    step = re.search(r"Interrupted: .* after step (\d+) of", " ".join(printed.split()))[1]
    assert store.list_names("student") == ["tiny-orpo", "tiny-sft"]
    code, printed = run_until(folder, f"goes on from step {step}")
    assert code == os.EX_TEMPFAIL, printed


def test_unchanged_run_executes_nothing_and_says_so(folder, store):
    before = _num_versions(store)
    done = mint(folder, "run", str(RECIPE))
    assert done.returncode == 0
    assert "Nothing to do" in done.stdout
    assert _num_versions(store) == before


def test_plan_of_a_changed_recipe_says_what_would_run_and_runs_nothing(folder, store):
    before = _num_versions(store)
    done = mint(folder, "plan", str(RECIPE), "--set", "alignment.epochs=2")
    assert done.returncode == 0
    assert done.stdout.count("would run and write a new version") == 4  # two students, the report, the model
    assert "optimizer steps on" in done.stdout
    assert _num_versions(store) == before


def test_one_stage_alone_makes_the_same_version_as_the_flow(folder, store):
    done = mint(folder, "preferences", str(RECIPE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(store.resolve("preferences/tiny"))


def test_show_leads_from_the_model_back_to_its_source(folder, store):
    done = mint(folder, "show", "model/tiny")
    assert done.returncode == 0
    for name in ["model/tiny", "student/tiny-orpo", "preferences/tiny", "rankings/tiny", "cases/tiny", "sha256:"]:
        assert name in done.stdout


def test_promote_of_a_model_whose_gate_failed_is_refused(folder, store):
    report = EvaluationReport.model_validate(store.read_json(store.resolve("report/tiny"), "report.json"))
    assert not report.gate.passed, "a student of random weights cannot beat its base"
    done = mint(folder, "promote", "model/tiny", "--who", "test", "--why", "test")
    assert done.returncode == 1
    assert "GateFailed" in done.stderr
    assert store.alias("model", "tiny", "champion") is None


def test_ls_shows_the_candidate(folder, store):
    done = mint(folder, "ls", "model")
    assert str(store.resolve("model/tiny")) in done.stdout
    assert "candidate" in done.stdout


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("preferences.bottom_q=5", "InvalidInput: .*larger than the label set of 6"),
        ("student.window_tokens=40", "PromptTooLong"),
    ],
)
def test_bad_setting_is_refused_by_its_stage_and_nothing_is_written(folder, store, setting, message):
    before = store.list_versions("preferences", "tiny")
    inputs = ("--input", "cases=cases/tiny", "--input", "rankings=rankings/tiny")
    done = mint(folder, "preferences", str(RECIPE), "--set", setting, *inputs)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert store.list_versions("preferences", "tiny") == before


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MINT_S3_ENDPOINT_URL": "http://127.0.0.1:9", "MINT_S3_DEADLINE_SECONDS": "2"}, "StoreUnreachable"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "AccessDenied"),
    ],
)
def test_run_without_a_usable_store_says_so_before_any_work(folder, store, environment, message):
    done = mint(folder, "run", str(RECIPE), **environment)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "wrong" not in done.stderr.replace("is wrong", "")


def write_delivery(folder: pathlib.Path) -> pathlib.Path:
    """Two observed patients of each label, in the flat shape of `phenopackets`."""
    findings = [("HP:0000316", "Hypertelorism"), ("HP:0001250", "Seizure"), ("HP:0004322", "Short stature")]
    findings += [("HP:0001999", "Abnormal facial shape"), ("HP:0000252", "Microcephaly"), ("HP:0001252", "Hypotonia")]
    rows = []
    for number in range(12):
        observed = [findings[(number + step) % 6] for step in range(1 + number // 6, 4 + number // 6)]
        label = yaml.safe_load(RECIPE.read_text())["data"]["config"]["label_ids"][number % 6]
        rows.append(
            {"case_id": f"b-{number}", "pmid": "PMID:2", "sex": "MALE", "age": f"P{number + 1}Y", "excluded": []}
        )
        rows[-1] |= {"observed": observed, "disease_id": label, "disease": "as the label says"}
    path = folder / "delivery.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_added_cases_are_ranked_by_the_teacher_that_is_there_and_retrained_on(folder, store):
    before = {kind: store.resolve(f"{kind}/tiny") for kind in ("cases", "rankings", "preferences")}
    add = ("data", "add", "phenopackets", "--to", "cases/tiny", "--batch", "clinic-b")
    done = mint(folder, *add, "--set", f"path={write_delivery(folder)}")
    assert done.returncode == 0, done.stderr
    grown = store.resolve("cases/tiny")
    assert done.stdout.splitlines()[-1] == str(grown)
    again = mint(folder, *add, "--set", f"path={write_delivery(folder)}", "--set", "min_findings=2")
    assert again.returncode == 2
    assert "holds them already" in again.stderr
    done = mint(folder, "run", str(RECIPE), "--cases", "cases/tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    rankings, preferences = (store.resolve(f"{kind}/tiny") for kind in ("rankings", "preferences"))
    assert store.record(rankings).inputs == {"cases": str(grown), "previous": str(before["rankings"])}
    counts = store.record(before["cases"]).counts
    assert store.record(rankings).counts["taken_over"] == sum(counts[f"{split}/cases"] for split in SPLITS)
    assert store.record(preferences).inputs["previous"] == str(before["preferences"])
    assert (
        store.record(preferences).counts["train_num_cases"]
        > store.record(before["preferences"]).counts["train_num_cases"]
    )
    assert store.record(store.resolve("report/tiny")).inputs["cases"] == str(grown)
    done = mint(folder, "gate", "preferences/tiny")
    assert done.returncode == 0
    assert "gate     passed" in done.stdout


def test_data_that_the_gate_refuses_lie_in_quarantine_and_stop_the_run(folder, store):
    before = store.list_versions("preferences", "tiny")
    done = mint(folder, "run", str(RECIPE), "--set", "preferences.gate.class_balance.min_effective_share=1.0")
    assert done.returncode == 1
    assert "preferences: GateFailed" in done.stderr
    assert store.list_versions("preferences", "tiny") == before
    quarantined = store.resolve("quarantine/tiny")
    assert f"mint gate quarantine/tiny@{quarantined.version}" in done.stderr
    done = mint(folder, "gate", "quarantine/tiny")
    assert done.returncode == 1
    assert "refused: " in done.stdout
    assert list((folder / ".mint" / "reports").glob("quarantine-tiny-*.html"))


def test_doctor_finds_a_usable_store(folder, store):
    done = mint(folder, "doctor")
    assert "writes, reads and conditional writes work" in done.stdout
