"""What Kubeflow makes of our components where no cluster is needed: its own local runner, and the command."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml
from kfp import local

from mint_lib.flow import list_steps
from mint_lib.recipe import load_recipe
from mint_lib.records import Reference

RECIPE = pathlib.Path(__file__).parent / "recipes" / "tiny.yaml"


@pytest.fixture
def runner(tmp_path):
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "root"), raise_on_error=True)


def test_component_shows_the_version_as_an_artifact(runner, store):
    from components.data import data

    step = next(step for step in list_steps(load_recipe(RECIPE)) if step.stage == "data")
    first = data(config=step.config.model_dump_json()).outputs
    reference = Reference.parse(first["Output"])
    version = first["version"]
    assert version.uri == f"mint:{reference}"
    assert version.metadata["was_cached"] == "false"
    assert version.metadata["location"] == f"s3://{store.settings.bucket}/{store.settings.prefix}/cases/tiny/v000001/"
    assert first["metrics"].metadata["reference"] == str(reference)
    assert first["metrics"].metadata["train_cases"] == store.record(reference).counts["train/cases"]
    second = data(config=step.config.model_dump_json()).outputs
    assert second["Output"] == str(reference)
    assert second["version"].metadata["was_cached"] == "true"


def test_clean_up_that_reaches_no_cluster_does_not_fail_the_run(runner, monkeypatch, tmp_path):
    from components.clean_up import clean_up

    monkeypatch.setenv("MINT_RUN_ID", "run-1")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    clean_up(namespace="mint")


def test_compile_in_two_processes_gives_the_same_bytes(tmp_path):
    digest = "@sha256:" + "ab" * 32
    cluster = tmp_path / "cluster.yaml"
    images = {"serve": "registry.example/mint-serve" + digest, "train": "registry.example/mint-train" + digest}
    values = {"namespace": "mint", "images": images, "s3": {"endpoint_url": "https://s3.example"}}
    cluster.write_text(json.dumps(values))
    ray = "cluster.alignment.ray={}"
    for seed in ("1", "2"):
        command = [sys.executable, "-m", "pipelines.cli", "compile", str(RECIPE), "-o", f"{seed}.yaml", "--set", ray]
        done = subprocess.run(
            [*command, "--cluster", str(cluster)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    assert (tmp_path / "1.yaml").read_bytes() == (tmp_path / "2.yaml").read_bytes()
    assert len(list(yaml.safe_load_all((tmp_path / "1.yaml").read_text()))) == 2


def test_compile_without_a_cluster_file_says_what_is_missing(tmp_path):
    command = [sys.executable, "-m", "pipelines.cli", "compile", str(RECIPE), "-o", str(tmp_path / "p.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--cluster is missing" in done.stderr
    assert "Traceback" not in done.stderr
