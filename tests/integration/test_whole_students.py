"""Students of which all weights were trained, from a real store: served with weights of their own, or refused."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from stored_models import (
    Blind,
    close_to,
    expected_scores,
    flip_bit,
    list_scratch,
    make_adapter,
    make_whole,
    scores_of,
    write_cases,
    write_model,
)

from mint_lib.engine.requests import EngineLimits
from mint_lib.errors import IntegrityError, InvalidInput, NotFound
from mint_lib.records import Reference
from mint_lib.server.engines import Engines
from mint_lib.server.loading import LoadConfig, load_student
from mint_lib.server.students import ServedStudent
from mint_lib.store import Store


@pytest.fixture
def engines() -> Iterator[Engines]:
    engines = Engines(limits=EngineLimits(prefix_cache_mib=16), observer=Blind())
    yield engines
    engines.stop()


def load(store: Store, engines: Engines, reference: Reference | str, **options: Any) -> ServedStudent:
    return load_student(store, str(reference), name="tiny", engines=engines, options=LoadConfig(**options))


def test_whole_student_answers_with_its_own_weights_beside_adapters_of_its_base(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    folders = [make_whole(tmp_path, number) for number in (1, 2)]
    students = [load(store, engines, write_model(store, folder)) for folder in folders]
    adapted = load(store, engines, write_model(store, make_adapter(tmp_path, 1)))
    assert len({id(student.engine) for student in (*students, adapted)}) == 3, "each has weights of its own"
    expected = [expected_scores(folder) for folder in folders]
    assert max(abs(one - other) for one, other in zip(*expected, strict=True)) > 0.1
    for student, scores in zip(students, expected, strict=True):
        assert scores_of(student) == close_to(scores)
    assert scores_of(adapted) == close_to(expected_scores(make_adapter(tmp_path, 1)))
    for student in (*students, adapted):
        engines.remove(student)
    assert engines.engines() == []


def test_whole_student_of_two_names_is_held_once_and_needs_no_base(
    store: Store, engines: Engines, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = write_model(store, make_whole(tmp_path, 1), calibration=1.7)
    expected = expected_scores(tmp_path / "whole-1" / "weights")
    monkeypatch.setenv("MINT_CACHE_DIR", str(tmp_path / "empty"))
    students = [load(store, engines, reference) for _ in range(2)]
    assert not (tmp_path / "empty").exists()
    assert students[0].engine is students[1].engine
    engines.remove(students[0])
    assert scores_of(students[1]) == close_to(expected)


def test_whole_student_with_a_file_that_is_no_weights_is_refused(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    folder = make_whole(tmp_path, 1)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    with pytest.raises(InvalidInput, match="holds 1 files that are neither weights, config nor tokenizer"):
        load(store, engines, write_model(store, folder))
    assert engines.engines() == []


def test_whole_student_that_says_it_is_an_adapter_is_refused(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(NotFound, match="'adapter'"):
        load(store, engines, write_model(store, make_whole(tmp_path, 1), facts={"tuning": "adapter"}))
    with pytest.raises(InvalidInput, match="all of its weights were trained"):
        load(store, engines, write_model(store, make_adapter(tmp_path, 1), facts={"tuning": "full"}))
    assert engines.engines() == []


def test_whole_student_whose_config_names_code_or_lies_is_refused(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    path = make_whole(tmp_path, 1) / "config.json"
    config = json.loads(path.read_text())
    for change in ({"auto_map": {"AutoModelForCausalLM": "own.Model"}}, {"hidden_size": 32}):
        path.write_text(json.dumps(config | change))
        with pytest.raises(InvalidInput, match=r"config\.json is refused"):
            load(store, engines, write_model(store, path.parent))
    assert engines.engines() == []


def test_whole_student_that_was_damaged_is_refused_and_leaves_nothing(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    reference = write_model(store, make_whole(tmp_path, 1))
    flip_bit(store, reference, "weights/model.safetensors")
    before = list_scratch()
    with pytest.raises(IntegrityError):
        load(store, engines, reference)
    assert engines.engines() == []
    assert list_scratch() == before


def test_whole_student_in_int8_that_keeps_the_answers_is_served(
    store: Store, engines: Engines, tmp_path: pathlib.Path
) -> None:
    reference = write_model(store, make_whole(tmp_path, 1), cases=write_cases(store))
    student = load(store, engines, reference, precision="int8")
    assert student.precision == "int8"
    assert engines.engines() == [student.engine]
