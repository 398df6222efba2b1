import json
import pathlib
import resource
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def _mint(*arguments, **options):
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **options)


def _cpu_seconds_of(function):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    function()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("alignment", "--help")])
def test_help_answers_in_under_a_second_of_processor_time(arguments):
    _mint(*arguments)
    assert min(_cpu_seconds_of(lambda: _mint(*arguments)) for _ in range(3)) < 1.0


def test_help_names_every_stage_and_command():
    text = _mint("--help").stdout
    for word in ["run", "plan", "doctor", "ls", "show", "promote", "rollback", "schema", "compile", "gc"]:
        assert f" {word} " in text
    for stage in ["data", "teacher", "preferences", "alignment", "evaluation", "registry"]:
        assert f" {stage} " in text


def test_unknown_recipe_key_exits_with_2_and_no_traceback(tmp_path):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text((ROOT / "pipelines/recipes/quickstart.yaml").read_text() + "\naligment: {}\n")
    done = _mint("run", str(recipe))
    assert done.returncode == 2
    assert "did you mean 'alignment'" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_kind_exits_with_2():
    done = _mint("ls", "weights")
    assert done.returncode == 2
    assert "Choose one of: cases" in done.stderr


def test_schema_is_json():
    assert json.loads(_mint("schema").stdout)["title"] == "Recipe"
