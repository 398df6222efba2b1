"""The store when the network, the server or the disk misbehaves: a named error or success, and never a torn version.

A proxy stands between the store and a real SeaweedFS, so requests, signatures and replies are real ones.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_proxy import ALWAYS, Fault, Proxy, running_proxy

from mint_lib.errors import AccessDenied, Conflict, IntegrityError, StoreError, StoreUnreachable
from mint_lib.records import Reference, StageRecord
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="test")
DATA = b"d" * 100_000


@pytest.fixture
def proxy(s3_environment: dict[str, str]) -> Iterator[Proxy]:
    upstream = urllib.parse.urlsplit(s3_environment["MINT_S3_ENDPOINT_URL"]).netloc
    with running_proxy(upstream) as server:
        yield server


@pytest.fixture
def faulty(proxy: Proxy) -> Store:
    """A store that reaches the server through the proxy and retries for 4 s."""
    port = proxy.server_address[1]
    settings = S3Settings(
        endpoint_url=f"http://127.0.0.1:{port}", prefix=f"test-{secrets.token_hex(8)}", deadline_seconds=4
    )
    return Store(settings)


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


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied_without_showing_them(
    store: Store, monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv(variable, "canary-of-a-secret")
    with pytest.raises(AccessDenied, match="credential") as caught:
        Store(store.settings).list_names("cases")
    assert "canary" not in str(caught.value)


def test_missing_credentials_are_denied(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bare = Store(store.settings)
    with pytest.raises(AccessDenied, match="no credentials were found"):
        bare.list_names("cases")
    with pytest.raises(AccessDenied, match="no credentials were found"):
        bare.arrow_filesystem()


def test_clock_that_runs_wrong_is_named(store: Store, monkeypatch: pytest.MonkeyPatch):
    import botocore.auth

    real = botocore.auth.get_current_datetime

    def late(*arguments: Any, **keywords: Any) -> Any:
        return real(*arguments, **keywords).replace(year=2020)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", late)
    with pytest.raises(AccessDenied, match="clock"):
        store.list_names("cases")


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
