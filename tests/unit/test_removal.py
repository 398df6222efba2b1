"""A version is removed while an alias moves to it: every order of their requests, and a death before each of them.

An S3 in memory lets one actor at a time make one request, in an order that a schedule gives. Its ETags are digests of
the bytes, as on a real server, so that equal bytes have equal ETags.
"""

import functools
import hashlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest

from mint_lib.errors import Conflict, InvalidInput, NotFound
from mint_lib.records import Reference
from mint_lib.storage.aliases import read_alias, swap_alias
from mint_lib.storage.client import StoredObject
from mint_lib.storage.layout import Layout
from mint_lib.storage.manifest import FileEntry, Manifest, canonical_json, digest_files
from mint_lib.storage.reader import read_committed
from mint_lib.storage.removal import remove_version, stop_removal

LAYOUT = Layout("")
CHAMPION = LAYOUT.alias("model", "demo", "champion")
MAX_STEPS = 200


class Died(BaseException):
    """The actor's process is gone."""


class Move(NamedTuple):
    """One step of a schedule."""

    actor: str
    dies: bool


class SteppedS3:
    """Requests about manifests and aliases wait for their turn; those about other objects concern nobody else."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.turns: dict[str, threading.Semaphore] = {}
        self.stopped = threading.Semaphore(0)
        self.dying: set[str] = set()

    def wait(self, key: str) -> None:
        actor = threading.current_thread().name
        if actor not in self.turns or not ("aliases/" in key or key.endswith("manifest.json")):
            return
        self.stopped.release()
        self.turns[actor].acquire()
        if actor in self.dying:
            raise Died

    def locate(self, key: str) -> str:
        return key

    def get(self, key: str) -> tuple[bytes, str]:
        self.wait(key)
        if key not in self.objects:
            raise NotFound(key)
        return self.objects[key], hashlib.md5(self.objects[key]).hexdigest()

    def put_if(self, key: str, body: bytes, *, etag: str | None, is_ours: Callable[[bytes], bool]) -> str:
        self.wait(key)
        found = self.objects.get(key)
        found_etag = None if found is None else hashlib.md5(found).hexdigest()
        if found_etag != etag:
            if found is not None and found_etag is not None and is_ours(found):
                return found_etag
            raise Conflict(key)
        self.objects[key] = body
        return hashlib.md5(body).hexdigest()

    def list_objects(self, prefix: str) -> Iterable[StoredObject]:
        self.wait(prefix)
        return [
            StoredObject(key, len(body), datetime.now(UTC))
            for key, body in sorted(self.objects.items())
            if key.startswith(prefix)
        ]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)


def commit(s3: SteppedS3, number: int) -> Reference:
    files = {"record.json": FileEntry(size=number, sha256="a" * 64)}
    manifest = Manifest(
        kind="model",
        name="demo",
        version=f"v{number:06d}",
        token=f"writer {number}",
        created_at=datetime(2026, 1, 2, tzinfo=UTC),
        environment={},
        files=files,
        digest=digest_files(files),
    )
    folder = LAYOUT.folder("model", "demo", manifest.version)
    s3.objects[folder + "record.json"] = b"r" * number
    s3.objects[folder + "manifest.json"] = canonical_json(manifest.model_dump(mode="json"))
    return Reference(kind="model", name="demo", version=manifest.version, digest=manifest.digest)


def move(s3: Any, to: Reference, *, expected: Reference | None) -> None:
    stop = functools.partial(stop_removal, s3, LAYOUT, to)
    swap_alias(s3, CHAMPION, to, who="w", why="y", expected=expected, check_target=stop)


def stands(s3: SteppedS3, reference: Reference) -> bool:
    return bool(s3.objects[LAYOUT.manifest("model", "demo", reference.version)])


def check_alias(s3: Any) -> None:
    """Whatever the alias says at this moment exists, to the last file."""
    alias = read_alias(s3, CHAMPION)
    if alias is not None:
        assert stands(s3, alias.reference)
        assert LAYOUT.folder("model", "demo", alias.reference.version) + "record.json" in s3.objects


def run_steps(s3: Any, actors: dict[str, Callable[[], None]], choose: Callable[[list[Move]], Move]) -> dict[str, str]:
    """What became of each actor: `done`, `died`, or the name of its error."""
    outcomes: dict[str, str] = {}

    def act(name: str) -> None:
        try:
            actors[name]()
            outcomes[name] = "done"
        except Died:
            outcomes[name] = "died"
        except (Conflict, InvalidInput, NotFound) as error:
            outcomes[name] = type(error).__name__
        finally:
            s3.stopped.release()

    s3.turns = {name: threading.Semaphore(0) for name in actors}
    for name in actors:
        threading.Thread(target=act, args=(name,), name=name, daemon=True).start()
        assert s3.stopped.acquire(timeout=10)
    for _ in range(MAX_STEPS):
        alive = sorted(set(actors) - set(outcomes))
        if not alive:
            return outcomes
        step = choose([Move(name, dies) for dies in ((False, True) if not s3.dying else (False,)) for name in alive])
        if step.dies:
            s3.dying.add(step.actor)
        s3.turns[step.actor].release()
        assert s3.stopped.acquire(timeout=10)
        check_alias(s3)
    raise AssertionError("the actors keep each other from coming to an end")


def run_all_orders(run: Callable[[Callable[[list[Move]], Move]], Any]) -> Iterator[Any]:
    """What `run` gives for every schedule, each found by taking the next choice at the last step that has one."""
    path: list[int] = []
    while True:
        counts: list[int] = []

        def choose(possible: list[Move], path: list[int] = path, counts: list[int] = counts) -> Move:
            place = len(counts)
            if place == len(path):
                path.append(0)
            counts.append(len(possible))
            return possible[path[place]]

        yield run(choose)
        del path[len(counts) :]
        while path and path[-1] == counts[len(path) - 1] - 1:
            path.pop()
        if not path:
            return
        path[-1] += 1


@pytest.mark.parametrize(
    ("start", "may_die"), [("pointing elsewhere", True), ("never set", False), ("marked by a remover that died", False)]
)
def test_removal_and_move_in_every_order_have_one_winner_and_leave_no_hole(start: str, may_die: bool):
    seen: Counter[tuple[str, str]] = Counter()

    def run(choose: Callable[[list[Move]], Move]) -> None:
        s3: Any = SteppedS3()
        target, other = commit(s3, 1), commit(s3, 2)
        expected = None if start == "never set" else other
        if expected is not None:
            move(s3, other, expected=None)
        if start.startswith("marked"):
            died = run_steps(s3, {"first": lambda: remove_version(s3, LAYOUT, target)}, die_after(2))
            assert died == {"first": "died"}
            s3.dying.clear()
        outcomes = run_steps(
            s3,
            {
                "mover": lambda: move(s3, target, expected=expected),
                "remover": lambda: remove_version(s3, LAYOUT, target),
            },
            lambda possible: choose([step for step in possible if may_die or not step.dies]),
        )
        s3.turns = {}
        seen[outcomes["mover"], outcomes["remover"]] += 1
        alias = read_alias(s3, CHAMPION)
        points = alias is not None and alias.reference == target
        if outcomes["mover"] == "done":
            assert points
        if outcomes["remover"] == "done":
            assert not stands(s3, target)
        if "died" not in outcomes.values():
            assert (outcomes["mover"] == "done") != (outcomes["remover"] == "done")
        # Whoever died: the next one finds its way.
        if points:
            with pytest.raises(InvalidInput, match="needed by alias champion"):
                remove_version(s3, LAYOUT, target)
            assert read_committed(s3, LAYOUT, target)[0].token == "writer 1"
        elif stands(s3, target):
            remove_version(s3, LAYOUT, target)
        assert stands(s3, target) == points

    num_orders = sum(1 for _ in run_all_orders(run))
    assert num_orders > 100
    assert seen["done", "InvalidInput"]
    assert seen["NotFound", "done"]
    assert bool(seen["died", "done"]) == bool(seen["done", "died"]) == may_die


def die_after(num_steps: int) -> Callable[[list[Move]], Move]:
    """A schedule for one actor that dies after so many requests."""
    left = [num_steps]

    def choose(possible: list[Move]) -> Move:
        left[0] -= 1
        return next(step for step in possible if step.dies == (left[0] < 0))

    return choose


@pytest.mark.parametrize("seed", range(300))
def test_several_removals_and_moves_in_some_order_leave_no_hole(seed: int):
    s3: Any = SteppedS3()
    chance = random.Random(seed)
    first, second, champion = commit(s3, 1), commit(s3, 2), commit(s3, 3)
    move(s3, champion, expected=None)
    last = [""]

    def choose(possible: list[Move]) -> Move:
        # Who has begun mostly goes on: what goes wrong needs few changes between actors, but at the wrong places.
        possible = [step for step in possible if not step.dies] if chance.random() < 0.97 else possible
        going_on = [step for step in possible if step.actor == last[0]] if chance.random() < 0.7 else []
        step = chance.choice(going_on or possible)
        last[0] = step.actor
        return step

    actors: dict[str, Callable[[], Any]] = {
        "to first": lambda: move(s3, first, expected=champion),
        "removes first": lambda: remove_version(s3, LAYOUT, first),
        "removes first, too": lambda: remove_version(s3, LAYOUT, first),
    }
    if seed % 2:
        actors["to second"] = lambda: move(s3, second, expected=champion)
        actors["removes second"] = lambda: remove_version(s3, LAYOUT, second)
    outcomes = run_steps(s3, actors, choose)
    s3.turns = {}
    alias = read_alias(s3, CHAMPION)
    assert alias is not None
    moved = [name for name in ("to first", "to second") if outcomes.get(name) == "done"]
    assert alias.reference == {"to first": first, "to second": second}[moved[0]] if moved else champion
    for name, reference in (("removes first", first), ("removes first, too", first), ("removes second", second)):
        if outcomes.get(name) == "done":
            assert not stands(s3, reference)
