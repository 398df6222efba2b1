"""Following an alias: what is swapped, what is refused, what is tried again."""

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from mint_lib.errors import (
    AccessDenied,
    ComputationFailed,
    DeadlineExceeded,
    GateFailed,
    IntegrityError,
    InvalidInput,
    NotFound,
    Overloaded,
    StoreUnreachable,
)
from mint_lib.records import Reference
from mint_lib.server.follow import Follower, Outcome
from mint_lib.server.students import Lineup, ServedStudent

OLD, NEW, NEWER = (Reference.parse(f"model/m@v00000{number}#sha256:{str(number) * 64}") for number in (1, 2, 3))


class Student:
    """As much of a served student as a lineup needs."""

    name = "m"

    def __init__(self, text: str):
        self.reference = Reference.parse(text)


class World:
    """A store with one alias, and a loader."""

    def __init__(self) -> None:
        self.alias: Reference | Exception = OLD
        self.broken: dict[str, Exception] = {}
        self.loaded: list[str] = []
        self.retired: list[Reference] = []
        self.told: list[tuple[str, Outcome]] = []
        self.lineup = Lineup()
        self.before_load: Callable[[], object] = lambda: None
        self.follower = Follower(
            cast(Any, self),
            self.lineup,
            name="m",
            alias="model/m@champion",
            load=self.load,
            retire=lambda student: self.retired.append(student.reference),
            interval_seconds=0.01,
            tell=lambda name, outcome: self.told.append((name, outcome)),
        )

    def resolve(self, text: str) -> Reference:
        assert text == "model/m@champion"
        if isinstance(self.alias, Exception):
            raise self.alias
        return self.alias

    def load(self, text: str) -> ServedStudent:
        self.before_load()
        self.loaded.append(text)
        if text in self.broken:
            raise self.broken[text]
        return cast(ServedStudent, Student(text))

    def serving(self) -> Reference:
        return self.lineup.students()[0].reference


@pytest.fixture
def world() -> World:
    world = World()
    assert world.follower.look() is Outcome.SWAPPED
    return world


def test_follower_at_its_first_look_loads_what_nobody_serves_yet(world: World) -> None:
    assert world.serving() == OLD
    assert world.follower.look() is Outcome.UNCHANGED
    assert world.loaded == [str(OLD)]


def test_follower_of_a_moved_alias_swaps_and_retires_the_old_one(world: World) -> None:
    world.alias = NEW
    assert world.follower.look() is Outcome.SWAPPED
    assert world.serving() == NEW
    assert world.retired == [OLD]


def test_follower_retires_the_old_one_only_when_its_last_request_is_answered(world: World) -> None:
    with world.lineup.lease("m") as student:
        world.alias = NEW
        assert world.follower.look() is Outcome.SWAPPED
        assert student.reference == OLD
        assert world.retired == []
    assert world.retired == [OLD]


@pytest.mark.parametrize(
    "error",
    [InvalidInput("x"), IntegrityError("x"), NotFound("x"), GateFailed("x"), ComputationFailed("x"), ValueError("x")],
    ids=lambda error: type(error).__name__,
)
def test_follower_of_a_bad_version_keeps_the_old_one_and_does_not_try_again(world: World, error: Exception) -> None:
    world.alias, world.broken = NEW, {str(NEW): error}
    assert world.follower.look() is Outcome.REFUSED
    assert world.follower.look() is Outcome.UNCHANGED
    assert world.serving() == OLD
    assert world.loaded == [str(OLD), str(NEW)]
    world.alias = NEWER
    assert world.follower.look() is Outcome.SWAPPED


def test_follower_tries_a_refused_version_again_after_the_alias_moved_away_and_back(world: World) -> None:
    world.alias, world.broken = NEW, {str(NEW): InvalidInput("x")}
    assert world.follower.look() is Outcome.REFUSED
    world.alias = OLD
    assert world.follower.look() is Outcome.UNCHANGED
    world.alias, world.broken = NEW, {}
    assert world.follower.look() is Outcome.SWAPPED


@pytest.mark.parametrize(
    "error",
    [StoreUnreachable("x"), AccessDenied("x"), Overloaded("x"), DeadlineExceeded("x")],
    ids=lambda error: type(error).__name__,
)
def test_follower_tries_again_what_says_nothing_about_the_version(world: World, error: Exception) -> None:
    world.alias, world.broken = NEW, {str(NEW): error}
    assert world.follower.look() is Outcome.POSTPONED
    assert world.serving() == OLD
    world.broken = {}
    assert world.follower.look() is Outcome.SWAPPED


@pytest.mark.parametrize("error", [StoreUnreachable("x"), NotFound("x"), IntegrityError("x")], ids=str)
def test_follower_of_an_alias_that_cannot_be_read_keeps_the_old_one(world: World, error: Exception) -> None:
    world.alias = error
    assert world.follower.look() is Outcome.POSTPONED
    assert world.serving() == OLD


def test_follower_waits_longer_while_the_store_is_silent_and_not_after() -> None:
    world = World()
    pauses = {}
    for num_postponed in (0, 1, 5, 1000):
        world.follower._num_postponed = num_postponed
        pauses[num_postponed] = world.follower._pause_seconds()
    assert pauses[0] == pytest.approx(0.01, rel=0.1)
    assert pauses[1] == pytest.approx(0.02, rel=0.1)
    assert pauses[5] == pytest.approx(0.32, rel=0.1)
    assert pauses[1000] == pytest.approx(300, rel=0.1)


def test_follower_in_its_thread_tells_every_look_and_stops(world: World) -> None:
    world.follower.start()
    world.alias = NEW
    give_up = time.monotonic() + 10
    while ("m", Outcome.UNCHANGED) not in world.told and time.monotonic() < give_up:
        time.sleep(0.005)
    world.follower.stop()
    assert ("m", Outcome.SWAPPED) in world.told
    num_told = len(world.told)
    time.sleep(0.05)
    assert len(world.told) == num_told


def test_follower_stopped_during_a_load_frees_the_student_and_does_not_serve_it(world: World) -> None:
    is_loading, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        is_loading.set()
        may_go_on.wait(10)

    world.before_load, world.alias = hold, NEW
    world.follower.start()
    assert is_loading.wait(10)
    world.follower._stopped.set()
    may_go_on.set()
    world.follower.stop()
    assert world.serving() == OLD
    assert world.retired == [NEW]
