"""The store when the network, the server or the disk misbehaves: a named error or success, and never a torn version.

A proxy stands between the store and a real SeaweedFS, so requests, signatures and replies are real ones.
"""

import itertools
import os
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from s3_proxy import ALWAYS, Fault, Proxy, running_proxy

from mint_lib.errors import (
    Conflict,
    IntegrityError,
    NotFound,
    StoreError,
    StoreUnreachable,
)
from mint_lib.records import KINDS, Label, Reference, StageRecord
from mint_lib.storage.connection import FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS
from mint_lib.storage.settings import S3Settings
from mint_lib.storage.verification import verify_version
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="test")
DATA = b"d" * 100_000


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    upstream = urllib.parse.urlsplit(s3_environment["MINT_S3_ENDPOINT_URL"]).netloc
    with running_proxy(upstream) as server:
        yield server


@pytest.fixture
def faulty(proxy: Proxy) -> Iterator[Store]:
    """A store that reaches the server through the proxy and retries for 4 s; whatever befell it, nothing is lost."""
    port = proxy.server_address[1]
    settings = S3Settings(
        endpoint_url=f"http://127.0.0.1:{port}", prefix=f"test-{secrets.token_hex(8)}", deadline_seconds=4
    )
    store = Store(settings)
    yield store
    proxy.faults = []
    committed = [f"{kind}/demo@{version}" for kind in KINDS for version in store.list_versions(kind, "demo")]
    for text in committed:
        assert verify_version(store._s3, store._layout, store.resolve(text)).damages == ()


def write_version(store: Store, *, data: bytes = DATA, version: str | None = None) -> Reference:
    with store.write("cases", "demo", version=version) as writer:
        writer.add_bytes("data.bin", data)
        return writer.commit(RECORD)


@pytest.mark.parametrize("part", ["claim.json", "data.bin", "record.json", "manifest.json"])
@pytest.mark.parametrize("action", ["lose-reply", "drop", "503 SlowDown", "409 ConditionalRequestConflict", "stall"])
def test_write_with_one_fault_succeeds_once(proxy: Proxy, faulty: Store, part: str, action: str):
    proxy.faults = [Fault("PUT", part, action)]
    reference = write_version(faulty, version="v000001")
    assert proxy.faults[0].times == 0
    assert faulty.list_versions("cases", "demo") == ["v000001"]
    assert faulty.read_bytes(reference, "data.bin") == DATA
    assert faulty.list_orphans() == []


@pytest.mark.parametrize("part", ["claim.json", "data.bin", "record.json", "manifest.json"])
@pytest.mark.parametrize("action", ["503 SlowDown", "500 InternalError", "507 InsufficientStorage", "drop"])
def test_write_with_a_lasting_fault_fails_within_the_deadline(proxy: Proxy, faulty: Store, part: str, action: str):
    proxy.faults = [Fault("PUT", part, action, ALWAYS)]
    hasty = Store(faulty.settings.model_copy(update={"deadline_seconds": 0.6}))
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match="mint doctor") as caught:
        write_version(hasty)
    assert time.monotonic() - began < 5
    assert faulty.settings.endpoint_url in str(caught.value)
    assert "disk" in str(caught.value)
    proxy.faults = []
    assert faulty.list_versions("cases", "demo") == []
    write_version(faulty)
    assert len(faulty.list_versions("cases", "demo")) == 1


def test_storm_of_503_is_weathered(proxy: Proxy, faulty: Store):
    proxy.faults = [Fault("PUT", "", "503 SlowDown", 4), Fault("GET", "", "503 SlowDown", 4)]
    assert faulty.read_bytes(write_version(faulty), "data.bin") == DATA
    assert [fault.times for fault in proxy.faults] == [0, 0]


def test_lost_race_after_a_lost_reply_is_still_a_conflict(proxy: Proxy, faulty: Store):
    write_version(faulty, version="v000001")
    proxy.faults = [Fault("PUT", "claim.json", "lose-reply")]
    with pytest.raises(Conflict):
        write_version(faulty, version="v000001")


def test_alias_moved_with_a_lost_reply_is_moved_once(proxy: Proxy, faulty: Store):
    first, second = write_version(faulty), write_version(faulty)
    for reference, expected in ((first, None), (second, first)):
        proxy.faults = [Fault("PUT", "aliases", "lose-reply")]
        alias = faulty.move_alias("champion", reference, who="w", why="y", expected=expected)
        assert proxy.faults[0].times == 0
        assert alias == faulty.alias("cases", "demo", "champion")
    assert [move.reference for move in alias.log] == [str(first), str(second)]


@pytest.mark.parametrize("action", ["lose-reply", "503 SlowDown", "drop"])
@pytest.mark.parametrize(("method", "part"), [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId")])
def test_large_file_with_one_fault_is_whole(
    proxy: Proxy, faulty: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, part: str, action: str
):
    monkeypatch.setattr("mint_lib.storage.client.PART_BYTES", 5 * 2**20)
    source = tmp_path / "weights.safetensors"
    source.write_bytes(os.urandom(11 * 2**20))
    proxy.faults = [Fault(method, part, action)]
    with faulty.write("student", "demo") as writer:
        writer.add_file("weights.safetensors", source)
        reference = writer.commit(RECORD)
    assert proxy.faults[0].times == 0
    assert (faulty.download(reference, tmp_path / "copy") / source.name).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("action", ["cut-reply", "flip-bit", "stall", "503 SlowDown", "drop"])
def test_read_with_one_fault_succeeds(proxy: Proxy, faulty: Store, tmp_path: Path, action: str):
    reference = write_version(faulty)
    proxy.faults = [Fault("GET", "data.bin", action)]
    assert (faulty.download(reference, tmp_path) / "data.bin").read_bytes() == DATA
    assert proxy.faults[0].times == 0


@pytest.mark.parametrize(
    ("action", "error"), [("cut-reply", StoreUnreachable), ("flip-bit", IntegrityError), ("drop", StoreUnreachable)]
)
def test_read_with_a_lasting_fault_leaves_no_file(
    proxy: Proxy, faulty: Store, tmp_path: Path, action: str, error: type[StoreError]
):
    reference = write_version(faulty)
    proxy.faults = [Fault("GET", "data.bin", action, ALWAYS)]
    with pytest.raises(error, match=r"data\.bin"):
        faulty.download(reference, tmp_path / "copy")
    assert [path for path in (tmp_path / "copy").rglob("*") if path.is_file()] == []


def test_read_of_a_cut_manifest_is_retried(proxy: Proxy, faulty: Store):
    reference = write_version(faulty)
    proxy.faults = [Fault("GET", "manifest.json", "cut-reply")]
    assert "data.bin" in faulty.files(reference)
    assert proxy.faults[0].times == 0


@pytest.mark.parametrize("action", ["cut-reply", "halt"])
def test_error_reply_that_does_not_come_whole_is_retried(proxy: Proxy, faulty: Store, action: str):
    proxy.faults = [Fault("GET", "champion", action)]
    assert faulty.alias("cases", "demo", "champion") is None
    assert proxy.faults[0].times == 0


def test_error_reply_that_never_comes_whole_is_an_error_of_the_store(proxy: Proxy, faulty: Store):
    proxy.faults = [Fault("GET", "champion", "halt", ALWAYS)]
    with pytest.raises(StoreUnreachable, match="champion"):
        faulty.alias("cases", "demo", "champion")


def test_upload_damaged_on_its_way_is_refused_by_the_server(store: Store):
    with pytest.raises(Exception, match="BadDigest"):
        store._s3.client.put_object(
            Bucket=store.settings.bucket, Key=f"{store.settings.prefix}/x", Body=b"x", ChecksumSHA256="A" * 43 + "="
        )


def test_closed_endpoint_is_unreachable_within_the_deadline():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = Store(S3Settings(endpoint_url=f"http://127.0.0.1:{port}", deadline_seconds=1))
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match=rf"s3://mint/.* at http://127\.0\.0\.1:{port}.*mint doctor"):
        store.list_names("cases")
    assert time.monotonic() - began < 3


def test_missing_bucket_is_named(store: Store):
    other = Store(store.settings.model_copy(update={"bucket": "not-there"}))
    with pytest.raises(StoreError, match="no bucket 'not-there'"):
        write_version(other)


def test_local_disk_that_is_full_leaves_no_file(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reference = write_version(store)
    full = OSError(28, "No space left on device")

    def refuse(*arguments: Any) -> None:
        raise full

    monkeypatch.setattr(store._s3, "get_verified", refuse)
    with pytest.raises(StoreError, match=r"data\.bin cannot be written \(No space left on device\)"):
        store.download(reference, tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_temporary_folder_that_is_full_leaves_no_version_of_rows(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    labels = [Label(id=f"D:{number}", name=secrets.token_hex(50)) for number in range(200)]
    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "name", "family")])
    schema = schema.append(pyarrow.field("synonyms", pyarrow.list_(pyarrow.string())))

    def write() -> Reference:
        with store.write("cases", "demo") as writer:
            writer.add_rows("train", labels, schema)
            return writer.commit(RECORD)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # no file may grow beyond it, as on a full disk
    try:
        with pytest.raises(StoreError, match=r"File too large\).*TMPDIR"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.list_versions("cases", "demo") == []
    assert list(tmp_path.iterdir()) == []
    assert store.read_rows(write(), "train", Label) == labels


@pytest.mark.parametrize("where", [0, 1, 1000, len(DATA) - 1])
def test_read_cut_after_any_number_of_bytes_succeeds(proxy: Proxy, faulty: Store, where: int):
    reference = write_version(faulty)
    proxy.faults = [Fault("GET", "data.bin", f"cut-reply {where}")]
    assert faulty.read_bytes(reference, "data.bin") == DATA
    assert proxy.faults[0].times == 0


@pytest.mark.parametrize("action", ["flip-bit", "flip-bit 40", "flip-bit -3", "cut-reply 20", "slow", "stall"])
@pytest.mark.parametrize("part", ["manifest.json", "aliases"])
def test_read_of_a_manifest_or_alias_with_one_fault_succeeds(proxy: Proxy, faulty: Store, part: str, action: str):
    reference = write_version(faulty)
    faulty.move_alias("champion", reference, who="w", why="y", expected=None)
    proxy.faults = [Fault("GET", part, action)]
    assert faulty.resolve("cases/demo@champion") == reference
    assert faulty.record(reference) == RECORD
    assert proxy.faults[0].times == 0


@pytest.mark.parametrize("byte", [0, 40, 200, -3])
@pytest.mark.parametrize("part", ["manifest.json", "aliases"])
def test_read_of_a_manifest_or_alias_that_is_always_damaged_is_refused(
    proxy: Proxy, faulty: Store, part: str, byte: int
):
    reference = write_version(faulty)
    faulty.move_alias("champion", reference, who="w", why="y", expected=None)
    proxy.faults = [Fault("GET", part, f"flip-bit {byte}", ALWAYS)]
    with pytest.raises(IntegrityError, match=rf"{part}.*damaged"):
        faulty.files(faulty.resolve("cases/demo@champion"))


def test_reply_that_trickles_is_given_up_within_the_deadline(proxy: Proxy, faulty: Store):
    reference = write_version(faulty)
    proxy.faults = [Fault("GET", "data.bin", "trickle", ALWAYS)]
    hasty = Store(faulty.settings.model_copy(update={"deadline_seconds": 2.0}))
    began = time.monotonic()
    with pytest.raises(StoreUnreachable, match=r"data\.bin.*no whole answer"):
        hasty.read_bytes(reference, "data.bin")
    assert time.monotonic() - began < 6
    proxy.faults = []
    assert hasty.read_bytes(reference, "data.bin") == DATA


@pytest.mark.parametrize("part", ["claim.json", "data.bin", "record.json", "manifest.json"])
def test_upload_with_a_flipped_bit_is_refused_and_sent_again(proxy: Proxy, faulty: Store, part: str):
    proxy.faults = [Fault("PUT", part, "flip-request")]
    reference = write_version(faulty)
    assert proxy.faults[0].times == 0
    assert faulty.read_bytes(reference, "data.bin") == DATA


def test_listing_that_is_no_listing_is_asked_for_again(proxy: Proxy, faulty: Store):
    write_version(faulty)
    proxy.faults = [Fault("GET", "list-type=2", "flip-bit"), Fault("GET", "list-type=2", "cut-reply")]
    assert faulty.list_versions("cases", "demo") == ["v000001"]
    assert [fault.times for fault in proxy.faults] == [0, 0]


def test_pauses_between_attempts_grow_and_are_drawn_within_bounds(proxy: Proxy, faulty: Store):
    proxy.faults = [Fault("GET", "list-type=2", "503 SlowDown", ALWAYS)]
    began = time.monotonic()
    with pytest.raises(StoreUnreachable):
        faulty.list_names("cases")
    assert time.monotonic() - began < faulty.settings.retry_seconds + 1
    moments = [item.at for item in proxy.seen]
    pauses = [after - before for before, after in itertools.pairwise(moments)]
    assert len(pauses) >= 4
    for number, pause in enumerate(pauses):
        longest = min(FIRST_PAUSE_SECONDS * 2**number, MAX_PAUSE_SECONDS)
        # A request takes a few milliseconds more, on a busy machine many.
        assert longest / 2 <= pause < longest + 0.5
    drawn = [pause / min(FIRST_PAUSE_SECONDS * 2**number, MAX_PAUSE_SECONDS) for number, pause in enumerate(pauses)]
    assert max(drawn) - min(drawn) > 0.01


@pytest.mark.parametrize("action", ["cut-reply 1000", "flip-bit 70", "503 SlowDown", "drop", "stall"])
def test_download_in_parts_with_one_fault_is_whole(
    proxy: Proxy, faulty: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str
):
    monkeypatch.setattr("mint_lib.storage.client.PART_BYTES", 30_000)
    reference = write_version(faulty)
    proxy.faults = [Fault("GET", "data.bin", action)]
    assert (faulty.download(reference, tmp_path) / "data.bin").read_bytes() == DATA
    assert proxy.faults[0].times == 0


@pytest.mark.parametrize("data", [DATA[:50_000], DATA + b"d", DATA[:-1] + b"e", b""])
def test_download_in_parts_of_another_object_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes
):
    reference = write_version(store)
    store._s3.put(f"{store.settings.prefix}/cases/demo/v000001/data.bin", data)
    monkeypatch.setattr("mint_lib.storage.client.PART_BYTES", 30_000)
    with pytest.raises(IntegrityError, match=r"v000001/data\.bin is damaged"):
        store.download(reference, tmp_path / "copy")
    assert [path for path in (tmp_path / "copy").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("method", "part"), [("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId"), ("DELETE", "uploadId")]
)
def test_large_file_with_a_lasting_fault_leaves_no_version(
    proxy: Proxy, faulty: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, part: str
):
    monkeypatch.setattr("mint_lib.storage.client.PART_BYTES", 5 * 2**20)
    source = tmp_path / "weights.safetensors"
    source.write_bytes(os.urandom(11 * 2**20))
    last_good = write_version(faulty)
    hasty = Store(faulty.settings.model_copy(update={"deadline_seconds": 1.0}))
    proxy.faults = [Fault(method, part, "503 SlowDown", ALWAYS), Fault("PUT", "partNumber=1", "507 Full", ALWAYS)]
    with hasty.write("student", "demo") as writer, pytest.raises(StoreUnreachable):
        writer.add_file("weights.safetensors", source)
    proxy.faults = []
    assert faulty.list_versions("student", "demo") == []
    assert faulty.read_bytes(last_good, "data.bin") == DATA
    faulty.collect_orphans(older_than_seconds=0)
    uploads = faulty._s3.client.list_multipart_uploads(Bucket=faulty.settings.bucket, Prefix=faulty.settings.prefix)
    assert "Uploads" not in uploads


def test_upload_that_somebody_aborted_is_not_taken_for_an_older_object_of_the_same_size(
    proxy: Proxy, faulty: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mint_lib.storage.client.PART_BYTES", 5 * 2**20)
    source, folder = tmp_path / "state", faulty.open_run("run-1")
    source.write_bytes(b"a" * 11 * 2**20)
    entry = folder.put_file("state", source)
    source.write_bytes(b"b" * 11 * 2**20)
    proxy.faults = [Fault("POST", "uploadId", "404 NoSuchUpload")]
    with pytest.raises(NotFound):
        folder.put_file("state", source)
    folder.get_file("state", entry, tmp_path / "copy")


def test_unfinished_uploads_of_many_pages_are_collected(faulty: Store, monkeypatch: pytest.MonkeyPatch):
    client, bucket = faulty._s3.client, faulty.settings.bucket
    for number in range(7):
        key = f"{faulty.settings.prefix}/cases/demo/v000001/big-{number}"
        client.create_multipart_upload(Bucket=bucket, Key=key)
    real = client.list_multipart_uploads
    monkeypatch.setattr(client, "list_multipart_uploads", lambda **arguments: real(MaxUploads=3, **arguments))
    faulty.collect_orphans(older_than_seconds=0)
    assert "Uploads" not in real(Bucket=bucket, Prefix=faulty.settings.prefix)


def test_object_replaced_under_a_running_reader_is_named_and_the_rest_stays_readable(store: Store):
    first, second = write_version(store), write_version(store, data=b"e" * 100_000)
    store._s3.put(f"{store.settings.prefix}/cases/demo/{first.version}/data.bin", b"e" * 100_000)
    with pytest.raises(IntegrityError, match=r"v000001/data\.bin is damaged: its sha256"):
        store.read_bytes(first, "data.bin")
    assert store.read_bytes(second, "data.bin") == b"e" * 100_000


FILL_DISK = """
import os, sys, time
from pathlib import Path
from mint_lib.errors import StoreUnreachable
from mint_lib.local_store import local_store
from mint_lib.records import StageRecord
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="test")
with local_store(Path(sys.argv[1])) as variables:
    os.environ.update(variables, MINT_S3_DEADLINE_SECONDS="2")
    store, written = Store.from_environment(), []
    try:
        while True:
            data = os.urandom(4_000_000)
            with store.write("cases", "demo") as writer:
                writer.add_bytes("data.bin", data)
                written.append((writer.commit(RECORD), data))
    except StoreUnreachable as error:
        assert "disk" in str(error), error
    assert 2 <= len(written) <= 10, len(written)
    assert store.list_versions("cases", "demo") == [reference.version for reference, _ in written]
    assert all(store.read_bytes(reference, "data.bin") == data for reference, data in written)
    print("kept", len(written))
"""


def test_server_disk_that_is_full_shows_no_torn_version(tmp_path: Path):
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("a small disk needs the program unshare")
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=40m none {small}"
    if subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this account may not mount a small disk in a namespace of its own")
    script = f'{mount} && exec "$0" -c "$1" {small}/s3'
    root = Path(__file__).parents[2]
    command = [unshare, "-rm", "sh", "-c", script, sys.executable, FILL_DISK]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("kept")
