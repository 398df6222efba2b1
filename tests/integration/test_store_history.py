"""Several clients at once on a real SeaweedFS behind a proxy that misbehaves: the recorded history can be explained.

What `history` cannot explain would be a lost update, two winners, a stale read, a lost commit or a torn version.
"""

import contextlib
import io
import random
import secrets
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from history import Operation, Outcome, Recorder, check_register, check_versions
from s3_proxy import ALWAYS, Fault, Proxy, Storm, running_proxy

from mint_lib.errors import Conflict, IntegrityError, InvalidInput, NotFound, StoreError, StoreUnreachable
from mint_lib.records import Reference, StageRecord
from mint_lib.storage.client import S3
from mint_lib.storage.manifest import RECORD as RECORD_PATH
from mint_lib.storage.manifest import digest_files
from mint_lib.storage.settings import S3Settings
from mint_lib.storage.verification import verify_version
from mint_lib.storage.writer import VersionWriter
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="test")
SEEDS = (1, 2, 3)
ACTIONS = (
    *("lose-reply", "drop", "cut-reply", "cut-reply 1", "flip-bit", "flip-bit 100", "flip-request", "slow"),
    *("503 SlowDown", "503 SlowDown", "409 ConditionalRequestConflict", "500 InternalError"),
)


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    with running_proxy(urllib.parse.urlsplit(s3_environment["MINT_S3_ENDPOINT_URL"]).netloc) as server:
        yield server


@pytest.fixture
def open_faulty(proxy: Proxy, store: Store) -> Callable[[], Store]:
    """A function that gives one more client of the same store, behind the proxy; it gives up after a second."""

    def make() -> Store:
        changes = {"endpoint_url": proxy.endpoint_url, "deadline_seconds": 1.0}
        return Store(S3Settings.model_validate(store.settings.model_dump() | changes))

    return make


def open_behind(proxy: Proxy, store: Store) -> Store:
    """One more client of the same store, behind the proxy; it is as patient as the store."""
    return Store(store.settings.model_copy(update={"endpoint_url": proxy.endpoint_url}))


def run_together(*tasks: Callable[[], None]) -> None:
    """Run every task in a thread of its own; raises what one of them raised."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()


def write_version(store: Store, data: bytes, *, base: Reference | None = None) -> Reference:
    with store.write("cases", "demo", base=base) as writer:
        for path in store.files(base) if base else ():
            if path != RECORD_PATH:
                writer.carry(path)
        writer.add_bytes(f"from-{writer.version}.bin", data)
        return writer.commit(RECORD)


def read_champion(client: Store, recorder: Recorder) -> Reference | None:
    """Where the alias points, as one operation of the history."""

    def look() -> Reference | None:
        alias = client.alias("cases", "demo", "champion")
        return alias.reference if alias else None

    return recorder.record(
        look, lambda found, called, returned: Operation("read", called, returned, value=found and str(found))
    )


def read_until(is_over: threading.Event, client: Store, recorder: Recorder) -> None:
    """Read the alias again and again; a read that fails is none."""
    while not is_over.is_set():
        with contextlib.suppress(StoreError):
            read_champion(client, recorder)


@pytest.mark.parametrize("seed", SEEDS)
def test_alias_under_a_storm_of_faults_is_a_register(
    store: Store, proxy: Proxy, open_faulty: Callable[[], Store], seed: int
):
    num_writers, num_moves = 4, 8
    versions = [write_version(store, b"%d" % number) for number in range(num_writers * num_moves)]
    recorder = Recorder()
    is_over = threading.Event()

    def move_often(index: int) -> None:
        client = open_faulty()
        for target in versions[index * num_moves : (index + 1) * num_moves]:
            try:
                expected = read_champion(client, recorder)
            except StoreError:
                continue

            def move(expected: Reference | None = expected, target: Reference = target) -> Outcome:
                try:
                    client.move_alias("champion", target, who="w", why="y", expected=expected)
                    return "done"
                except Conflict:
                    return "refused"
                except StoreError:
                    return "unknown"

            recorder.record(
                move,
                lambda outcome, called, returned, expected=expected, target=target: Operation(
                    "move", called, returned, outcome, expected=expected and str(expected), value=str(target)
                ),
            )

    proxy.storm = Storm(seed, 0.2, ACTIONS)
    with ThreadPoolExecutor(2) as readers:
        watching = [readers.submit(read_until, is_over, open_faulty(), recorder) for _ in range(2)]
        try:
            run_together(*(lambda index=index: move_often(index) for index in range(num_writers)))  # type: ignore[misc]
        finally:
            is_over.set()
    for watcher in watching:
        watcher.result()
    proxy.storm = None
    read_champion(store, recorder)
    assert {item.action for item in proxy.seen if item.action} > {"lose-reply", "flip-bit 100", "503 SlowDown"}
    moves = [item for item in recorder.operations if item.action == "move"]
    assert {item.outcome for item in moves} >= {"done", "refused"}
    assert check_register(recorder.operations) == []

    alias = store.alias("cases", "demo", "champion")
    assert alias is not None
    logged = [item.reference for item in alias.log]
    assert [item.previous for item in alias.log] == [None, *logged[:-1]]
    assert {item.value for item in moves if item.outcome == "done"} <= set(logged)
    assert not {item.value for item in moves if item.outcome == "refused"} & set(logged)


@pytest.mark.parametrize("seed", SEEDS)
def test_versions_under_a_storm_of_faults_lose_no_commit(
    store: Store, proxy: Proxy, open_faulty: Callable[[], Store], seed: int
):
    recorder = Recorder()
    is_over = threading.Event()
    first = write_version(store, b"first")
    started = time.monotonic()
    recorder.operations.append(Operation("commit", started, started, value=name_version(first)))

    def write_often(index: int) -> None:
        client = open_faulty()
        chance = random.Random(f"{seed} {index}")
        for number in range(6):
            _commit(
                client, recorder, chance.randbytes(2000 + number), explicit=f"v{100 + number:06d}" * (number % 3 == 0)
            )

    def read_often() -> None:
        client = open_faulty()
        while not is_over.is_set():
            try:
                called = time.monotonic()
                versions = client.list_versions("cases", "demo")
                returned = time.monotonic()
                found = frozenset(name_version(store.resolve(f"cases/demo@{version}")) for version in versions)
            except StoreError:
                continue
            recorder.operations.append(Operation("list", called, returned, found=found))
            reference = store.resolve(f"cases/demo@{random.Random(returned).choice(versions)}")
            _fetch(client, recorder, reference, proxy)

    proxy.storm = Storm(seed, 0.15, ACTIONS)
    with ThreadPoolExecutor(2) as readers:
        watching = [readers.submit(read_often) for _ in range(2)]
        try:
            run_together(*(lambda index=index: write_often(index) for index in range(4)))  # type: ignore[misc]
        finally:
            is_over.set()
    for watcher in watching:
        watcher.result()
    proxy.storm = None
    final = [store.resolve(f"cases/demo@{version}") for version in store.list_versions("cases", "demo")]
    assert all(verify_version(store._s3, store._layout, reference).is_whole for reference in final)
    assert check_versions(recorder.operations, final=map(name_version, final)) == []
    outcomes = {item.outcome for item in recorder.operations if item.action == "commit"}
    assert outcomes >= {"done", "refused"}


@pytest.mark.parametrize("seed", SEEDS)
def test_versions_removed_while_others_build_on_them_keep_their_bytes(store: Store, seed: int):
    recorder = Recorder()
    is_over = threading.Event()
    write_version(store, b"first")

    def write_often(index: int) -> None:
        client = Store(store.settings)
        for number in range(8):
            try:
                base = client.resolve("cases/demo")
                _commit(client, recorder, b"%d %d" % (index, number), base=base)
            except NotFound:
                continue

    def remove_often() -> None:
        client = Store(store.settings)
        chance = random.Random(seed)
        while not is_over.wait(0.02):
            versions = client.list_versions("cases", "demo")
            chosen = chance.choice(versions) if versions else ""
            # Newer ones too, so that writers find their base gone; one always stays to build on.
            if len(versions) > 1 and chosen != versions[0]:
                try:
                    reference = client.resolve(f"cases/demo@{chosen}")
                    called = time.monotonic()
                    client.remove(reference)
                except (Conflict, NotFound):
                    continue
                removal = Operation("remove", called, time.monotonic(), value=name_version(reference))
                recorder.operations.append(removal)

    def collect_often() -> None:
        client = Store(store.settings)
        while not is_over.wait(0.05):
            client.collect_orphans(older_than_seconds=1)

    with ThreadPoolExecutor(3) as operators:
        tidying = [operators.submit(task) for task in (remove_often, remove_often, collect_often)]
        try:
            run_together(*(lambda index=index: write_often(index) for index in range(3)))  # type: ignore[misc]
        finally:
            is_over.set()
    for task in tidying:
        task.result()
    store.collect_orphans(older_than_seconds=0)
    final = [store.resolve(f"cases/demo@{version}") for version in store.list_versions("cases", "demo")]
    for reference in final:
        assert verify_version(store._s3, store._layout, reference).damages == ()
    first = Operation("commit", 0, 0, value=name_version(store.resolve("cases/demo@v000001")))
    assert check_versions([first, *recorder.operations], final=map(name_version, final)) == []
    assert any(item.action == "remove" for item in recorder.operations)


def test_bytes_of_a_removed_version_stay_for_a_writer_whose_base_goes_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    first = write_version(store, b"shared")
    second = write_version(store, b"second", base=first)
    writer = store.write("cases", "demo", base=second)
    real = S3.get

    def get(s3: S3, key: str) -> tuple[bytes, str]:
        # The operator has listed who holds the first version, and asks next whether the second still exists.
        if key.endswith(f"{second.version}/manifest.json"):
            monkeypatch.setattr(S3, "get", real)
            try:
                writer.__enter__()
            except Conflict:
                return real(s3, key)
            store.remove(second)
        return real(s3, key)

    monkeypatch.setattr(S3, "get", get)
    store.remove(first)
    monkeypatch.setattr(S3, "get", real)
    if writer.version:
        writer.carry("from-v000001.bin")
        try:
            reference = writer.commit(RECORD)
        except Conflict:
            return
        assert store.read_bytes(reference, "from-v000001.bin") == b"shared"


@pytest.mark.parametrize("seed", SEEDS)
def test_alias_under_a_storm_of_moves_and_removals_stays_on_versions_that_stand(
    store: Store, proxy: Proxy, open_faulty: Callable[[], Store], seed: int
):
    num_movers, num_moves = 3, 8
    versions = [write_version(store, b"%d" % number) for number in range(num_movers * num_moves)]
    recorder = Recorder()
    is_over = threading.Event()
    wanted = versions[::num_moves]
    """What each mover moves to next: the removers aim at these."""

    def move_often(index: int) -> None:
        client = open_faulty()
        for target in versions[index * num_moves : (index + 1) * num_moves]:
            wanted[index] = target
            try:
                expected = read_champion(client, recorder)
            except StoreError:
                continue
            called = time.monotonic()
            outcome: Outcome = "done"
            try:
                client.move_alias("champion", target, who="w", why="y", expected=expected)
            except Conflict:
                outcome = "refused"
            except NotFound:
                # Its target is gone: no move at all. Should it have taken effect, a read of it has no explanation.
                continue
            except StoreError:
                outcome = "unknown"
            done = Operation(
                "move",
                called,
                time.monotonic(),
                outcome,
                expected=str(expected) if expected else None,
                value=str(target),
            )
            recorder.operations.append(done)

    def remove_often(number: int) -> None:
        client = open_faulty()
        chance = random.Random(f"{seed} {number}")
        while not is_over.wait(chance.random() * 0.02):
            target = chance.choice(wanted)
            called = time.monotonic()
            try:
                client.remove(target)
            except (InvalidInput, StoreError):
                continue
            else:
                recorder.operations.append(Operation("remove", called, time.monotonic(), value=str(target)))

    proxy.storm = Storm(seed, 0.1, ACTIONS)
    with ThreadPoolExecutor(3) as others:
        running = [others.submit(remove_often, number) for number in (1, 2)]
        running.append(others.submit(read_until, is_over, open_faulty(), recorder))
        try:
            run_together(*(lambda index=index: move_often(index) for index in range(num_movers)))  # type: ignore[misc]
        finally:
            is_over.set()
    for task in running:
        task.result()
    proxy.storm = None
    last = read_champion(store, recorder)
    assert check_register([item for item in recorder.operations if item.action in ("move", "read")]) == []
    removals = [item for item in recorder.operations if item.action == "remove"]
    for removal in removals:
        for item in recorder.operations:
            assert (item.action, item.value) != ("read", removal.value) or item.called < removal.returned
    assert last is not None
    standing = [store.resolve(f"cases/demo@{version}") for version in store.list_versions("cases", "demo")]
    assert last in standing
    assert not {item.value for item in removals} & {str(reference) for reference in standing}
    for reference in standing:
        assert verify_version(store._s3, store._layout, reference).damages == ()
    assert removals


@pytest.mark.parametrize("is_set", [True, False])
def test_move_held_before_its_swap_does_not_reach_a_version_that_was_removed_meanwhile(
    store: Store, proxy: Proxy, is_set: bool
):
    target, other = write_version(store, b"1"), write_version(store, b"2")
    expected = other if is_set else None
    if is_set:
        store.move_alias("champion", other, who="w", why="y", expected=None)
    else:
        # An alias that was never set is written first as one that points nowhere.
        proxy.faults = [Fault("PUT", "aliases/champion", "")]
    proxy.faults.append(Fault("PUT", "aliases/champion", "hold"))
    with ThreadPoolExecutor(1) as pool:
        client = open_behind(proxy, store)
        moving = pool.submit(client.move_alias, "champion", target, who="w", why="y", expected=expected)
        assert proxy.held.wait(10)
        store.remove(target)
        proxy.released.set()
        with pytest.raises(NotFound, match="it was removed"):
            moving.result()
    alias = store.alias("cases", "demo", "champion")
    assert (alias and alias.reference) == expected


@pytest.mark.parametrize(
    ("method", "part", "skipped", "error"),
    [
        ("PUT", "v000001/manifest.json", 0, InvalidInput),
        ("GET", "aliases", 0, InvalidInput),
        ("PUT", "aliases", 0, InvalidInput),
        ("PUT", "v000001/manifest.json", 1, Conflict),
    ],
    ids=["before the mark", "before the aliases are listed", "before the fence", "before the end"],
)
def test_removal_that_is_held_while_an_alias_moves_to_the_version_leaves_it_whole(
    store: Store, proxy: Proxy, method: str, part: str, skipped: int, error: type[Exception]
):
    target, other = write_version(store, b"1"), write_version(store, b"2")
    store.move_alias("champion", other, who="w", why="y", expected=None)
    manifest = store._s3.get(store._layout.manifest("cases", "demo", target.version))
    proxy.faults = [*[Fault(method, part, "")] * skipped, Fault(method, part, "hold")]
    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(open_behind(proxy, store).remove, target)
        assert proxy.held.wait(10)
        store.move_alias("champion", target, who="w", why="y", expected=other)
        proxy.released.set()
        with pytest.raises(error):
            removing.result()
    assert store.resolve("cases/demo@champion") == target
    assert verify_version(store._s3, store._layout, target).is_whole
    assert store._s3.get(store._layout.manifest("cases", "demo", target.version)) == manifest


@pytest.mark.parametrize("moves", [True, False])
def test_remover_that_dies_before_the_end_leaves_a_version_that_can_be_used_and_removed(
    store: Store, proxy: Proxy, open_faulty: Callable[[], Store], moves: bool
):
    target = write_version(store, b"1")
    proxy.faults = [Fault("PUT", "manifest.json", ""), Fault("PUT", "manifest.json", "drop", ALWAYS)]
    with pytest.raises(StoreUnreachable):
        open_faulty().remove(target)
    assert store.list_versions("cases", "demo") == [target.version]
    assert verify_version(store._s3, store._layout, target).is_whole
    if moves:
        store.move_alias("champion", target, who="w", why="y", expected=None)
        with pytest.raises(InvalidInput, match="needed by alias champion"):
            store.remove(target)
        assert store.resolve("cases/demo@champion") == target
    else:
        store.remove(target)
        assert store.list_versions("cases", "demo") == []


def test_remover_that_dies_after_the_end_leaves_files_that_are_collected_and_no_target_for_an_alias(
    store: Store, proxy: Proxy, open_faulty: Callable[[], Store]
):
    target = write_version(store, b"1")
    proxy.faults = [Fault("DELETE", "", "drop", ALWAYS)]
    with pytest.raises(StoreUnreachable):
        open_faulty().remove(target)
    with pytest.raises(NotFound):
        store.move_alias("champion", target, who="w", why="y", expected=None)
    assert store.alias("cases", "demo", "champion") is None
    assert [(item.version, item.num_objects) for item in store.collect_orphans(older_than_seconds=0)] == [
        (target.version, 2)
    ]
    assert store.list_orphans() == []


def test_mover_that_dies_before_its_swap_changes_nothing_and_keeps_nothing(
    store: Store, proxy: Proxy, open_faulty: Callable[[], Store]
):
    target = write_version(store, b"1")
    proxy.faults = [Fault("PUT", "aliases", ""), Fault("PUT", "aliases", "drop", ALWAYS)]
    with pytest.raises(StoreUnreachable):
        open_faulty().move_alias("champion", target, who="w", why="y", expected=None)
    assert store.alias("cases", "demo", "champion") is None
    store.remove(target)
    assert store.list_versions("cases", "demo") == []


def name_version(reference: Reference) -> str:
    return f"{reference.version}#{reference.digest}"


def _commit(
    client: Store, recorder: Recorder, data: bytes, *, explicit: str = "", base: Reference | None = None
) -> None:
    """One attempt at a version, recorded if its outcome can matter to others."""
    writers: list[VersionWriter] = []
    called = time.monotonic()
    outcome: Outcome = "done"
    try:
        with client.write("cases", "demo", version=explicit or None, base=base) as writer:
            writers.append(writer)
            for path in client.files(base) if base else ():
                if path != RECORD_PATH:
                    writer.carry(path)
            writer.add_bytes(f"from-{writer.version}-{secrets.token_hex(2)}.bin", data)
            writer.commit(RECORD)
    except Conflict:
        outcome = "refused"
    except StoreError:
        outcome = "unknown"
    has_begun = bool(writers) and RECORD_PATH in writers[0]._files
    value = f"{writers[0].version}#{digest_files(writers[0]._files)}" if has_begun else f"v0#{secrets.token_hex(8)}"
    if outcome == "unknown" and not has_begun:
        outcome = "refused"
    recorder.operations.append(Operation("commit", called, time.monotonic(), outcome, value=value))


def _fetch(client: Store, recorder: Recorder, reference: Reference, proxy: Proxy) -> None:
    """Read all of a version; an answer that never came, or came damaged twice, says nothing about it."""
    called = time.monotonic()
    detail = ""
    try:
        for path, entry in client.files(reference).items():
            client._s3.get_verified(client._key(reference, path, entry), entry, io.BytesIO())
    except (IntegrityError, NotFound) as error:
        detail = type(error).__name__
        flips = Counter(item.path for item in proxy.seen if item.at >= called and item.action.startswith("flip-bit"))
        if isinstance(error, IntegrityError) and max(flips.values(), default=0) >= 2:
            return
    except StoreError:
        return
    outcome: Outcome = "refused" if detail else "done"
    operation = Operation("fetch", called, time.monotonic(), outcome, value=name_version(reference), detail=detail)
    recorder.operations.append(operation)
