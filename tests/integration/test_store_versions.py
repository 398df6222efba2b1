"""Versions and aliases on a real SeaweedFS: what is written is read back, races have one winner, damage is found."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mint_lib.errors import Conflict, IntegrityError, InvalidInput, NotFound, StoreError
from mint_lib.records import Case, Reference, StageRecord
from mint_lib.rows import case_schema
from mint_lib.storage.client import PART_BYTES
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={"seed": 1}, inputs={}, code_version="test", counts={"cases": 2})
NUM_RACERS = 8
NUM_ROUNDS = 10


def write_version(store: Store, *, version: str | None = None, files: dict[str, bytes] | None = None) -> Reference:
    with store.write("cases", "demo", version=version) as writer:
        for path, data in (files or {"data/a.bin": b"a" * 1000, "b.bin": b"b"}).items():
            writer.add_bytes(path, data)
        return writer.commit(RECORD)


def replace_object(store: Store, reference: Reference, path: str, data: bytes) -> None:
    """Change an object behind the store's back."""
    settings = store.settings
    key = f"{settings.prefix}/{reference.kind}/{reference.name}/{reference.version}/{path}"
    store._s3.client.put_object(Bucket=settings.bucket, Key=key, Body=data)


def race(task: Callable[[int], Any]) -> list[Any]:
    """What `NUM_RACERS` threads that start together return or raise."""

    def run(index: int) -> Any:
        try:
            return task(index)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(NUM_RACERS) as pool:
        return list(pool.map(run, range(NUM_RACERS)))


def test_version_written_is_read_back(store: Store, tmp_path: Path):
    cases = [
        Case(case_id="1", group_id="g", text="t", attributes={"sex": "f"}, source="s", synthetic=True),
        Case(case_id="2", group_id="g", image=b"png", label_id="OMIM:1", source="s", synthetic=True),
    ]
    folder = tmp_path / "adapter"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep/weights.safetensors").write_bytes(b"w" * 5000)
    (folder / "config.json").write_text("{}")
    with store.write("cases", "demo") as writer:
        writer.add_rows("train", cases, case_schema())
        writer.add_json("labels.json", [{"id": "OMIM:1", "name": "é"}])
        writer.add_folder("adapter", folder)
        reference = writer.commit(RECORD)

    assert str(reference).startswith("cases/demo@v000001#sha256:")
    assert store.read_rows(reference, "train", Case) == cases
    assert store.read_json(reference, "labels.json") == [{"id": "OMIM:1", "name": "é"}]
    assert store.record(reference) == RECORD
    assert "pyarrow" in store.environment(reference)
    assert abs(store.created_at(reference).timestamp() - time.time()) < 60
    adapter = store.download(reference, tmp_path / "copy", "adapter")
    assert adapter == tmp_path / "copy/adapter"
    assert (adapter / "deep/weights.safetensors").read_bytes() == b"w" * 5000
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()) == [
        "config.json",
        "weights.safetensors",
    ]
    whole = store.download(reference, tmp_path / "whole")
    assert {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()} == set(
        store.files(reference)
    )


def test_file_larger_than_one_part_is_read_back(store: Store, tmp_path: Path):
    source = tmp_path / "weights.safetensors"
    source.write_bytes(os.urandom(2 * PART_BYTES + 12345))
    with store.write("student", "demo") as writer:
        writer.add_file("weights.safetensors", source)
        reference = writer.commit(RECORD)
    copy = store.download(reference, tmp_path / "copy") / "weights.safetensors"
    assert copy.read_bytes() == source.read_bytes()


def test_file_that_changes_while_it_is_stored_is_refused(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "weights.safetensors"
    source.write_bytes(b"a" * (2 * PART_BYTES))
    create = store._s3.client.create_multipart_upload

    def create_and_change(**arguments: Any) -> Any:
        source.write_bytes(b"b" * (2 * PART_BYTES))
        return create(**arguments)

    monkeypatch.setattr(store._s3.client, "create_multipart_upload", create_and_change)
    store._s3.settings = store.settings.model_copy(update={"deadline_seconds": 0.5})
    with store.write("student", "demo") as writer, pytest.raises(IntegrityError, match=r"weights\.safetensors"):
        writer.add_file("weights.safetensors", source)
    assert store.list_versions("student", "demo") == []


def test_same_content_gives_the_same_digest(store: Store, s3_store: Callable[[], Store]):
    first, second, elsewhere = write_version(store), write_version(store), write_version(s3_store())
    assert first.version == "v000001"
    assert second.version == "v000002"
    assert first.digest == second.digest == elsewhere.digest
    assert write_version(store, files={"b.bin": b"c"}).digest != first.digest


def test_empty_store_lists_nothing(store: Store):
    assert store.list_names("cases") == []
    assert store.list_versions("cases", "demo") == []
    assert store.list_orphans() == []
    assert store.alias("cases", "demo", "champion") is None
    with pytest.raises(NotFound, match="no version"):
        store.resolve("cases/demo")


def test_reference_in_any_form_resolves(store: Store):
    first, second = write_version(store), write_version(store)
    store.move_alias("champion", first, who="w", why="y", expected=None)
    assert store.resolve(str(first)) == first
    assert store.resolve("cases/demo@v000001") == first
    assert store.resolve("cases/demo") == store.resolve("cases/demo@latest") == second
    assert store.resolve("cases/demo@champion") == first
    assert store.list_names("cases") == ["demo"]
    assert store.list_versions("cases", "demo") == ["v000001", "v000002"]
    for text in ["cases/demo@v000003", "cases/demo@candidate", "cases/other"]:
        with pytest.raises(NotFound, match="mint ls"):
            store.resolve(text)
    with pytest.raises(IntegrityError, match="digest"):
        store.resolve(str(first).replace(first.digest, "sha256:" + "0" * 64))


def test_version_number_above_a_million_is_the_newest(store: Store):
    write_version(store, version="v999999")
    assert write_version(store).version == "v1000000"
    assert store.resolve("cases/demo").version == "v1000000"


def test_file_that_is_not_in_the_version_is_not_found(store: Store, tmp_path: Path):
    reference = write_version(store)
    with pytest.raises(NotFound, match=r"b\.bin"):
        store.read_bytes(reference, "c.bin")
    with pytest.raises(NotFound, match="'dat'"):
        store.download(reference, tmp_path, "dat")


@pytest.mark.parametrize("path", ["data/a.bin", "data", "data/a.bin/x", "../x", "manifest.json"])
def test_path_that_clashes_or_climbs_is_refused(store: Store, path: str):
    with store.write("cases", "demo") as writer:
        writer.add_bytes("data/a.bin", b"a")
        with pytest.raises(InvalidInput):
            writer.add_bytes(path, b"b")
        reference = writer.commit(RECORD)
    assert set(store.files(reference)) == {"data/a.bin", "record.json"}


def test_folder_with_a_link_or_without_files_is_refused(store: Store, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/passwd").symlink_to("/etc/passwd")
    with store.write("cases", "demo") as writer:
        with pytest.raises(InvalidInput, match="holds no file"):
            writer.add_folder("x", tmp_path / "empty")
        with pytest.raises(InvalidInput, match="not a plain file"):
            writer.add_folder("x", tmp_path / "linked")


def test_bit_flip_in_an_object_is_found_by_name(store: Store, tmp_path: Path):
    reference = write_version(store)
    replace_object(store, reference, "data/a.bin", b"a" * 500 + b"c" + b"a" * 499)
    for read in (
        lambda: store.read_bytes(reference, "data/a.bin"),
        lambda: store.download(reference, tmp_path / "copy"),
    ):
        with pytest.raises(IntegrityError, match=r"v000001/data/a\.bin is damaged: its sha256"):
            read()
    assert not (tmp_path / "copy/data/a.bin").exists()
    assert list((tmp_path / "copy").rglob("*.part")) == []


@pytest.mark.parametrize(
    ("data", "cause"), [(b"a" * 999, "has 999 bytes"), (b"a" * 10**6, "is longer"), (b"", "has 0")]
)
def test_object_of_another_length_is_found_by_name(store: Store, data: bytes, cause: str):
    reference = write_version(store)
    replace_object(store, reference, "data/a.bin", data)
    with pytest.raises(IntegrityError, match=rf"v000001/data/a\.bin is damaged: it {cause}"):
        store.read_bytes(reference, "data/a.bin")


def test_object_deleted_under_a_version_is_found_by_name(store: Store):
    reference = write_version(store)
    store._s3.delete(f"{store.settings.prefix}/cases/demo/v000001/data/a.bin")
    with pytest.raises(IntegrityError, match=r"v000001/data/a\.bin is damaged: it is missing"):
        store.read_bytes(reference, "data/a.bin")
    assert store.read_bytes(reference, "b.bin") == b"b"


def test_manifest_of_another_version_is_refused(store: Store):
    first, second = write_version(store), write_version(store, files={"b.bin": b"c"})
    replace_object(store, first, "manifest.json", b"{}")
    with pytest.raises(IntegrityError, match=r"v000001/manifest\.json"):
        store.files(first)
    manifest = store._s3.get(f"{store.settings.prefix}/cases/demo/{second.version}/manifest.json")[0]
    replace_object(store, first, "manifest.json", manifest)
    with pytest.raises(IntegrityError, match="belongs to cases/demo@v000002"):
        store.files(first)


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_writer_killed_before_its_manifest_leaves_nothing_visible(store: Store, end: str):
    program = (
        "import os, signal\nfrom mint_lib.store import Store\nstore = Store.from_environment()\n"
        "with store.write('cases', 'demo') as writer:\n"
        f"    writer.add_bytes('data/a.bin', b'half')\n    writer.add_json('record.json', {{}})\n    {end}\n"
    )
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False)
    assert ended.returncode in (1, -signal.SIGKILL)

    assert store.list_versions("cases", "demo") == []
    with pytest.raises(NotFound):
        store.resolve("cases/demo@v000001")
    again = write_version(store)
    assert again.version == "v000002"
    with pytest.raises(Conflict, match="is taken"), store.write("cases", "demo", version="v000001"):
        pass

    (orphan,) = store.list_orphans()
    assert (orphan.kind, orphan.name, orphan.version, orphan.num_objects) == ("cases", "demo", "v000001", 3)
    assert store.collect_orphans(older_than_seconds=3600) == []
    assert store.collect_orphans(older_than_seconds=0) == [orphan]
    assert store.list_orphans() == []
    assert store.list_versions("cases", "demo") == ["v000002"]
    assert store.read_bytes(again, "b.bin") == b"b"
    assert write_version(store).version == "v000003"


def test_slow_writer_whose_files_were_collected_cannot_commit(store: Store):
    with store.write("cases", "demo") as writer:
        writer.add_bytes("a", b"a")
        assert len(store.collect_orphans(older_than_seconds=0)) == 1
        with pytest.raises(Conflict):
            writer.commit(RECORD)
    assert store.list_versions("cases", "demo") == []
    with pytest.raises(NotFound):
        store.resolve("cases/demo@v000001")


def test_unfinished_upload_is_collected(store: Store):
    client, bucket = store._s3.client, store.settings.bucket
    client.create_multipart_upload(Bucket=bucket, Key=f"{store.settings.prefix}/cases/demo/v000001/big")
    store.collect_orphans(older_than_seconds=0)
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket, Prefix=store.settings.prefix)


def test_writer_that_fails_leaves_nothing_visible(store: Store):
    with pytest.raises(InvalidInput), store.write("cases", "demo") as writer:
        writer.add_json("a", float("nan"))
    assert store.list_versions("cases", "demo") == []


def test_race_for_one_explicit_version_has_one_winner(store: Store):
    def task(index: int) -> Reference:
        return write_version(store, version="v000007", files={f"from-{index}": b"%d" % index})

    results = race(task)
    winners = [result for result in results if isinstance(result, Reference)]
    assert len(winners) == 1
    assert sum(isinstance(result, Conflict) for result in results) == NUM_RACERS - 1
    index = results.index(winners[0])
    assert set(store.files(winners[0])) == {f"from-{index}", "record.json"}
    assert [orphan.version for orphan in store.list_orphans()] == []


def test_race_without_explicit_version_gives_distinct_unmixed_versions(store: Store):
    results = race(lambda index: write_version(store, files={f"from-{index}": b"%d" % index, "same": b"%d" % index}))
    assert all(isinstance(result, Reference) for result in results), results
    assert len({result.version for result in results}) == NUM_RACERS
    for index, reference in enumerate(results):
        assert set(store.files(reference)) == {f"from-{index}", "same", "record.json"}
        assert store.read_bytes(reference, "same") == b"%d" % index
    assert len(store.list_versions("cases", "demo")) == NUM_RACERS


def test_alias_moves_and_keeps_its_log(store: Store):
    first, second = write_version(store), write_version(store)
    store.move_alias("champion", first, who="ann", why="first", expected=None)
    moved = store.move_alias("champion", second, who="bob", why="better", expected=first)
    assert store.alias("cases", "demo", "champion") == moved
    assert moved.reference == second
    assert [(move.previous, move.reference, move.who, move.why) for move in moved.log] == [
        (None, str(first), "ann", "first"),
        (str(first), str(second), "bob", "better"),
    ]
    for expected in (None, first):
        with pytest.raises(Conflict, match="somebody else moved it"):
            store.move_alias("champion", first, who="eve", why="late", expected=expected)
    assert store.list_versions("cases", "demo") == ["v000001", "v000002"]


def test_alias_to_a_missing_version_is_refused(store: Store):
    reference = write_version(store)
    missing = reference.model_copy(update={"version": "v000009"})
    with pytest.raises(NotFound):
        store.move_alias("champion", missing, who="w", why="y", expected=None)
    assert store.alias("cases", "demo", "champion") is None


def test_alias_race_has_exactly_one_winner_each_round(store: Store):
    current: Reference | None = None
    versions = [write_version(store, files={"x": b"%d" % index}) for index in range(2 * NUM_RACERS)]
    for number in range(NUM_ROUNDS):
        # No racer moves the alias to where it already points: that would let a second one win rightly.
        chosen = versions[number % 2 :: 2]

        def task(index: int, chosen: list[Reference] = chosen, expected: Reference | None = current) -> Reference:
            return store.move_alias("champion", chosen[index], who=str(index), why="race", expected=expected).reference

        results = race(task)
        winners = [result for result in results if isinstance(result, Reference)]
        assert len(winners) == 1, results
        assert sum(isinstance(result, Conflict) for result in results) == NUM_RACERS - 1
        current = winners[0]
    alias = store.alias("cases", "demo", "champion")
    assert alias is not None
    assert alias.reference == current
    assert len(alias.log) == NUM_ROUNDS
    assert [move.previous for move in alias.log[1:]] == [move.reference for move in alias.log[:-1]]


def test_damaged_alias_is_refused_by_name(store: Store):
    store._s3.put(f"{store.settings.prefix}/cases/demo/aliases/champion.json", b"{")
    with pytest.raises(IntegrityError, match=r"champion\.json"):
        store.resolve("cases/demo@champion")


def test_output_remembered_is_found_until_its_version_is_gone(store: Store):
    reference = write_version(store)
    assert store.find_output("k") is None
    store.remember_output("k", reference)
    assert store.find_output("k") == reference
    store.remember_output("k", reference.model_copy(update={"digest": "sha256:" + "0" * 64}))
    assert store.find_output("k") is None
    store.remember_output("k", reference)
    store._s3.delete(f"{store.settings.prefix}/cases/demo/v000001/manifest.json")
    assert store.find_output("k") is None


def test_arrow_filesystem_reads_and_writes_run_folders(store: Store):
    filesystem = store.arrow_filesystem()
    place = store.runs_path("run-1")
    filesystem.create_dir(place)
    with filesystem.open_output_stream(f"{place}/checkpoint/model.safetensors") as file:
        file.write(b"w" * 1000)
    with filesystem.open_input_stream(f"{place}/checkpoint/model.safetensors") as file:
        assert file.read() == b"w" * 1000
    assert store.list_orphans() == []


def test_arrow_filesystem_renews_credentials_that_expire(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = tmp_path / "calls"
    script = tmp_path / "credentials.py"
    # They expire soon enough that a client which renews them asks again at once.
    script.write_text(
        "import datetime, json, pathlib\n"
        f"with pathlib.Path({str(calls)!r}).open('a') as file: file.write('.')\n"
        "soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=4)\n"
        f"keys = {{'AccessKeyId': {os.environ['AWS_ACCESS_KEY_ID']!r},"
        f" 'SecretAccessKey': {os.environ['AWS_SECRET_ACCESS_KEY']!r}}}\n"
        "print(json.dumps({'Version': 1, 'Expiration': soon.strftime('%Y-%m-%dT%H:%M:%SZ'), **keys}))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile expiring]\ncredential_process = {sys.executable} {script}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "expiring")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    filesystem = Store(store.settings).arrow_filesystem()
    place = f"{store.runs_path('run-1')}/state"
    for content in (b"first", b"second"):
        num_before = len(calls.read_text())
        with filesystem.open_output_stream(place) as file:
            file.write(content)
        with filesystem.open_input_stream(place) as file:
            assert file.read() == content
        assert len(calls.read_text()) > num_before
        time.sleep(5)


def test_two_versions_removed_while_a_third_builds_on_them_keep_its_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    """v3 builds on v2, whose bytes lie in v1; v2 goes after v1's holds were listed and before its manifest is read."""
    with store.write("cases", "demo") as writer:
        writer.add_bytes("a.bin", b"a")
        first = writer.commit(RECORD)
    with store.write("cases", "demo", base=first) as writer:
        writer.carry("a.bin")
        second = writer.commit(RECORD)
    get, late = store._s3.get, Store(store.settings)
    writers: list[Any] = []

    def get_late(key: str) -> tuple[bytes, str]:
        if key.endswith("v000002/manifest.json") and not writers:
            writers.append(late.write("cases", "demo", base=second).__enter__())
            writers[0].carry("a.bin")
            late.remove(second)
        return get(key)

    monkeypatch.setattr(store._s3, "get", get_late)
    store.remove(first)
    assert len(writers) == 1
    third = writers[0].commit(RECORD)
    assert late.read_bytes(third, "a.bin") == b"a"
