"""How long a checkpoint stops the training: uploaded beside it against waited for, over a link of 10 MB/s.

    python tests/benchmarks/checkpoint_stall.py --rounds 5

A proxy on loopback holds all connections together to the link's rate; behind it runs a real S3 server. What is restored
at the end is compared with what was saved last; where it differs nothing is printed.
"""

import argparse
import contextlib
import os
import pathlib
import secrets
import socket
import statistics
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

from mint_lib.local_store import local_store
from mint_lib.storage.settings import S3Settings
from mint_lib.store import Store
from mint_lib.training.checkpoint_writer import CheckpointWriter
from mint_lib.training.checkpoints import RunCheckpoints

BYTES_PER_SECOND = 10_000_000
NUM_BYTES = 40_000_000
_CHUNK_BYTES = 2**16


class Stall(NamedTuple):
    """Seconds for which `save` kept its caller, in one round."""

    beside: float
    waited_for: float


class SlowLink:
    """Relays connections to a server at so many bytes a second in all; either direction counts."""

    def __init__(self, upstream: tuple[str, int], bytes_per_second: float):
        self._upstream = upstream
        self._rate = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(self._upstream)
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=(source, target), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK_BYTES):
                with self._lock:
                    self._free_at = max(self._free_at, time.monotonic()) + len(data) / self._rate
                    pause = self._free_at - time.monotonic()
                time.sleep(max(0.0, pause))
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def measure_stalls(num_rounds: int, *, num_bytes: int = NUM_BYTES, rate: float = BYTES_PER_SECOND) -> list[Stall]:
    """One `Stall` per round; saving beside the training and waiting for it alternate.

    Raises:
        ValueError: what was restored is not what was saved.
    """
    with tempfile.TemporaryDirectory() as scratch, _slow_store(pathlib.Path(scratch), rate) as store:
        folder = pathlib.Path(scratch)
        stalls = []
        with CheckpointWriter(store, "run", attempt=secrets.token_hex(8), rank=0, num_ranks=1) as writer:
            for number in range(num_rounds):
                weights = os.urandom(num_bytes)
                beside = _time_save(writer, 2 * number, folder, weights, wait=False)
                # The upload beside goes on meanwhile, as in a training whose steps take longer than an upload.
                time.sleep(1.5 * num_bytes / rate)
                stalls.append(Stall(beside, _time_save(writer, 2 * number + 1, folder, weights, wait=True)))
        RunCheckpoints(store, "run").restore(folder / "restored")
        if (folder / "restored" / "weights.bin").read_bytes() != weights:
            raise ValueError("what was restored is not what was saved last")
        return stalls


def _time_save(writer: CheckpointWriter, step: int, scratch: pathlib.Path, weights: bytes, *, wait: bool) -> float:
    folder = scratch / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(weights)
    began = time.perf_counter()
    writer.save(step, folder, wait=wait)
    return time.perf_counter() - began


@contextlib.contextmanager
def _slow_store(folder: pathlib.Path, rate: float) -> Iterator[Store]:
    with local_store(folder / "s3") as variables:
        os.environ.update(variables)
        url = urllib.parse.urlsplit(variables["MINT_S3_ENDPOINT_URL"])
        link = SlowLink((str(url.hostname), int(url.port or 80)), rate)
        settings = S3Settings.from_environment()
        # A part of 16 MiB takes seconds here: the 20 s of a loopback endpoint would be too few for four at once.
        yield Store(settings.model_copy(update={"endpoint_url": link.endpoint_url, "deadline_seconds": 120.0}))
        link.close()


def main() -> None:
    """Print the stalls and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    stalls = measure_stalls(parser.parse_args().rounds)
    ratios = [stall.beside / stall.waited_for for stall in stalls]
    print(  # noqa: T201 (a program)
        f"checkpoint stall: beside {statistics.median(stall.beside for stall in stalls) * 1000:.2f} ms, waited for "
        f"{statistics.median(stall.waited_for for stall in stalls):.2f} s, ratio {statistics.median(ratios):.5f} "
        f"({min(ratios):.5f} to {max(ratios):.5f}) over {len(stalls)} rounds"
    )


if __name__ == "__main__":
    main()
