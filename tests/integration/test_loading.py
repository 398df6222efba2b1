"""Loading, swapping and following students from a real store, on tiny models that answer through the real engine."""

import functools
import json
import math
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stored_models import (
    FACTS,
    LABELS,
    STUDENT,
    TEMPLATE,
    TEXT,
    Blind,
    close_to,
    expected_scores,
    flip_bit,
    list_scratch,
    make_adapter,
    make_record,
    scores_of,
    write_cases,
    write_model,
)

from mint_lib.engine.requests import EngineLimits
from mint_lib.errors import ComputationFailed, Draining, GateFailed, IntegrityError, InvalidInput, MintError, NotFound
from mint_lib.records import Reference
from mint_lib.server.base_files import mirror_base
from mint_lib.server.engines import Engines
from mint_lib.server.follow import Follower, Outcome
from mint_lib.server.loading import LoadConfig, load_student
from mint_lib.server.students import Lineup, ServedStudent
from mint_lib.store import Store

Adapters = Callable[[int], pathlib.Path]


@pytest.fixture
def engines() -> Iterator[Engines]:
    engines = Engines(limits=EngineLimits(prefix_cache_mib=16), observer=Blind())
    yield engines
    engines.stop()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Folders of different adapters, by number."""
    return functools.partial(make_adapter, tmp_path_factory.mktemp("adapters"))


def load(store: Store, engines: Engines, reference: Reference | str, **options: Any) -> ServedStudent:
    return load_student(store, str(reference), name="tiny", engines=engines, options=LoadConfig(**options))


def test_loaded_model_answers_as_it_did_in_training(store: Store, engines: Engines, adapters: Adapters) -> None:
    reference = write_model(store, adapters(1), calibration=1.7)
    student = load(store, engines, "model/tiny", abstain_below=0.3)
    assert student.reference == reference
    assert scores_of(student) == close_to(expected_scores(adapters(1)))
    assert student.encode_case(TEXT).ids
    assert (student.temperature, student.num_calibration_cases, student.abstain_below) == (1.7, 9, 0.3)
    assert (student.intended_use, student.limits) == ("Tests.", ("Not a medical device.",))
    assert student.precision == "float32"
    assert student.load_seconds > 0


def test_loaded_model_without_calibration_or_passed_gate_says_so(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    student = load(store, engines, write_model(store, adapters(1), card={"gate_passed": False}))
    assert (student.temperature, student.num_calibration_cases) == (1.0, 0)
    assert any("gate" in limit for limit in student.limits)
    assert any("not calibrated" in limit for limit in student.limits)


def test_loaded_student_that_was_not_registered_says_so(store: Store, engines: Engines, adapters: Adapters) -> None:
    student = load(store, engines, write_model(store, adapters(1), kind="student"))
    assert any("not registered" in limit for limit in student.limits)
    assert scores_of(student) == close_to(expected_scores(adapters(1)))


def test_students_of_one_base_share_its_engine_and_the_last_one_stops_it(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    students = [load(store, engines, write_model(store, adapters(number))) for number in (1, 2)]
    assert students[0].engine is students[1].engine
    assert len(engines.engines()) == 1
    for number, student in zip((1, 2), students, strict=True):
        assert scores_of(student) == close_to(expected_scores(adapters(number)))
    engines.remove(students[0])
    assert scores_of(students[1]) == close_to(expected_scores(adapters(2)))
    engines.remove(students[1])
    assert engines.engines() == []


def test_students_loaded_at_once_load_their_base_once(store: Store, engines: Engines, adapters: Adapters) -> None:
    references = [write_model(store, adapters(number)) for number in (1, 2, 3)]
    students: list[ServedStudent] = []
    threads = [
        threading.Thread(target=lambda reference=reference: students.append(load(store, engines, reference)))
        for reference in references
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {student.reference for student in students} == set(references)
    assert len({id(student.engine) for student in students}) == 1


def test_load_after_the_engines_were_stopped_is_draining(store: Store, engines: Engines, adapters: Adapters) -> None:
    reference = write_model(store, adapters(1))
    load(store, engines, reference)
    engines.stop()
    assert engines.engines() == []
    with pytest.raises(Draining):
        load(store, engines, reference)


def test_retired_student_is_freed_in_the_background(store: Store, engines: Engines, adapters: Adapters) -> None:
    kept, retired = (load(store, engines, write_model(store, adapters(number))) for number in (1, 2))
    engines.retire(retired)
    wait_until(lambda: retired.adapter not in retired.engine._adapters.names)
    assert scores_of(kept) == close_to(expected_scores(adapters(1)))


def test_base_mirrored_in_the_store_serves_like_the_original(
    store: Store, engines: Engines, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror_base(store, STUDENT, "tiny")
    reference = write_model(store, adapters(1))
    monkeypatch.setattr("mint_lib.server.base_files.fetch_student_folder", forbid)
    student = load(store, engines, reference, base="base/tiny")
    assert scores_of(student) == close_to(expected_scores(adapters(1)))


def forbid(*_: Any, **__: Any) -> pathlib.Path:
    raise AssertionError("the mirror holds all files")


def test_mirror_of_another_base_is_refused_before_it_is_downloaded(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    mirror = mirror_base(store, STUDENT, "tiny")
    flip_bit(store, mirror, "files/model.safetensors")  # reading it would end in IntegrityError
    reference = write_model(
        store, adapters(1), facts={"base_digest": "sha256:other"}, card={"base_digest": "sha256:other"}
    )
    with pytest.raises(InvalidInput, match="belongs to another base"):
        load(store, engines, reference, base="base/tiny")


def bad_template(store: Store, adapters: Adapters) -> Reference:
    return write_model(store, adapters(1), template=TEMPLATE.data + b"\n# another\n")


def bad_bit(store: Store, adapters: Adapters) -> Reference:
    reference = write_model(store, adapters(1))
    flip_bit(store, reference, "adapter/adapter_model.safetensors")
    return reference


def bad_pickle(store: Store, adapters: Adapters) -> Reference:
    import torch

    with tempfile.TemporaryDirectory(prefix="test-") as scratch:
        folder = pathlib.Path(shutil.copytree(adapters(1), pathlib.Path(scratch) / "adapter"))
        torch.save({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
        return write_model(store, folder)


def scale_weights(store: Store, adapters: Adapters, factor: float) -> Reference:
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(prefix="test-") as scratch:
        folder = pathlib.Path(shutil.copytree(adapters(1), pathlib.Path(scratch) / "adapter"))
        path = folder / "adapter_model.safetensors"
        save_file({name: tensor * factor for name, tensor in load_file(path).items()}, path)
        return write_model(store, folder)


OTHER: dict[str, Any] = {"base_digest": "sha256:" + "0" * 64}
Write = Callable[[Store, Adapters], Reference]
BAD: dict[str, tuple[type[Exception], str, Write]] = {
    "bit flipped in the adapter": (IntegrityError, "is damaged: its sha256", bad_bit),
    "pickle named safetensors": (InvalidInput, "begins like a pickle", bad_pickle),
    "weights that are not finite": (InvalidInput, "not finite", lambda store, a: scale_weights(store, a, math.nan)),
    # Finite in the file, and infinite once it is multiplied out: only the warm answer shows it.
    "weights that overflow": (ComputationFailed, "", lambda store, a: scale_weights(store, a, 1e30)),
    "other base": (
        InvalidInput,
        "another base: it was",
        lambda store, a: write_model(store, a(1), facts=OTHER, card=OTHER),
    ),
    "card of another base": (InvalidInput, "The card of", lambda store, a: write_model(store, a(1), card=OTHER)),
    "other template": (InvalidInput, "another template", bad_template),
    "unknown key in student.json": (
        InvalidInput,
        "student.json of .* has 1 fields",
        lambda store, a: write_model(store, a(1), facts={"loader": "x"}),
    ),
    "window beyond the base": (
        InvalidInput,
        "a window of 4096 tokens, and its base reads 2048",
        lambda store, a: write_model(store, a(1), facts={"student": FACTS["student"] | {"window_tokens": 4096}}),
    ),
    "temperature 0": (InvalidInput, "calibration.json of", lambda store, a: damaged_calibration(store, a)),
    "one label": (InvalidInput, "needs two labels", lambda store, a: write_model(store, a(1), labels=LABELS[:1])),
    "a label twice": (
        InvalidInput,
        "its own id and name",
        lambda store, a: write_model(store, a(1), labels=(*LABELS, LABELS[0])),
    ),
    "cases": (InvalidInput, "is a version of cases", lambda store, a: write_cases(store)),
}


def damaged_calibration(store: Store, adapters: Adapters) -> Reference:
    with store.write("model", "tiny") as version:
        good = write_model(store, adapters(1), calibration=1.0)
        with tempfile.TemporaryDirectory(prefix="test-") as scratch:
            folder = store.download(good, pathlib.Path(scratch))
            data = json.loads((folder / "calibration.json").read_text()) | {"temperature": 0}
            (folder / "calibration.json").write_text(json.dumps(data))
            for path in store.files(good):
                if path != "record.json":
                    version.add_file(path, folder / path)
        return version.commit(make_record("registry"))


@pytest.mark.parametrize(("error", "message", "write"), BAD.values(), ids=BAD)
def test_load_that_fails_leaves_nothing_behind(
    store: Store,
    engines: Engines,
    adapters: Adapters,
    error: type[Exception],
    message: str,
    write: Write,
) -> None:
    reference = write(store, adapters)
    before = list_scratch()
    with pytest.raises(error, match=message):
        load(store, engines, reference)
    assert engines.engines() == []
    assert list_scratch() <= before


def test_load_that_fails_beside_a_good_student_leaves_it_answering(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    good = load(store, engines, write_model(store, adapters(1)))
    with pytest.raises(MintError):
        load(store, engines, scale_weights(store, adapters, 1e30))
    assert scores_of(good) == close_to(expected_scores(adapters(1)))
    assert len(engines.engines()) == 1


def test_load_of_what_does_not_exist_is_not_found(store: Store, engines: Engines) -> None:
    with pytest.raises(NotFound):
        load(store, engines, "model/nobody@champion")


def test_int8_that_keeps_the_answers_is_served(store: Store, engines: Engines, adapters: Adapters) -> None:
    cases = write_cases(store)
    student = load(store, engines, write_model(store, adapters(1), cases=cases), precision="int8")
    assert student.precision == "int8"
    assert engines.engines() == [student.engine]


def test_int8_on_too_few_cases_is_refused_and_leaves_nothing(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    cases = write_cases(store, num_cases=18)
    with pytest.raises(GateFailed, match=r"has 18 .* 20 are needed\. Serve in float32"):
        load(store, engines, write_model(store, adapters(1), cases=cases), precision="int8")
    assert engines.engines() == []


def follow(store: Store, lineup: Lineup, engines: Engines, told: list[Outcome]) -> Follower:
    return Follower(
        store,
        lineup,
        name="tiny",
        alias="model/tiny@champion",
        load=lambda reference: load(store, engines, reference),
        retire=engines.retire,
        interval_seconds=0.1,
        tell=lambda _, outcome: told.append(outcome),
    )


def move(store: Store, reference: Reference) -> None:
    alias = store.alias("model", "tiny", "champion")
    store.move_alias("champion", reference, who="t", why="t", expected=alias.reference if alias else None)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it did not come about"
        time.sleep(0.02)


def test_follower_swaps_under_load_without_a_mixed_or_lost_answer(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    references = {write_model(store, adapters(number)): number for number in (1, 2)}
    expected = {reference: expected_scores(adapters(number)) for reference, number in references.items()}
    first, second = references
    lineup, told = Lineup(), list[Outcome]()
    move(store, first)
    follower = follow(store, lineup, engines, told)
    assert follower.look() is Outcome.SWAPPED
    answers: list[tuple[Reference, list[float]]] = []
    failures: list[BaseException] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            try:
                with lineup.lease("tiny") as student:
                    answers.append((student.reference, scores_of(student)))
            except BaseException as error:
                failures.append(error)
                return

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    follower.start()
    for _ in range(3):
        for reference in (second, first):
            move(store, reference)
            wait_until(lambda wanted=reference: lineup.students()[0].reference == wanted)
    enough.set()
    for client in clients:
        client.join()
    follower.stop()
    assert failures == []
    assert {reference for reference, _ in answers} == {first, second}
    for reference, scores in answers:
        assert scores == close_to(expected[reference])
    # The replaced ones are gone: one engine, one user of it.
    wait_until(lambda: list(engines._num_users.values()) == [1])


@pytest.mark.parametrize(
    "write", [BAD[name][2] for name in ("bit flipped in the adapter", "pickle named safetensors", "other base")]
)
def test_follower_refuses_a_bad_version_once_and_takes_the_next_good_one(
    store: Store, engines: Engines, adapters: Adapters, write: Write
) -> None:
    lineup = Lineup()
    follower = follow(store, lineup, engines, [])
    good = write_model(store, adapters(1))
    move(store, good)
    assert follower.look() is Outcome.SWAPPED
    move(store, write(store, adapters))
    assert follower.look() is Outcome.REFUSED
    assert follower.look() is Outcome.UNCHANGED
    assert lineup.students()[0].reference == good
    assert scores_of(lineup.students()[0]) == close_to(expected_scores(adapters(1)))
    better = write_model(store, adapters(2))
    move(store, better)
    assert follower.look() is Outcome.SWAPPED
    assert lineup.students()[0].reference == better


def test_follower_of_a_store_that_is_gone_leaves_the_student_serving(
    store: Store, engines: Engines, adapters: Adapters
) -> None:
    lineup = Lineup()
    move(store, write_model(store, adapters(1)))
    assert follow(store, lineup, engines, []).look() is Outcome.SWAPPED
    update = {"endpoint_url": "http://127.0.0.1:9", "deadline_seconds": 1}
    gone = Store(store.settings.model_copy(update=update))
    told: list[Outcome] = []
    follower = follow(gone, lineup, engines, told)
    follower.start()
    wait_until(lambda: len(told) >= 1)
    follower.stop()
    assert set(told) == {Outcome.POSTPONED}
    assert scores_of(lineup.students()[0]) == close_to(expected_scores(adapters(1)))
