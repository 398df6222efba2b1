"""How long a training loop stands still for a checkpoint, when the store is at the end of a slow link.

Goes in: a store, the size of a checkpoint, and the link's rate. Comes out: functions that save one checkpoint as the
training loop does, waiting for the store or not. What the trainer writes to local disk first is copied into place
within the measured time.
"""

import asyncio
import contextlib
import pathlib
import queue
import secrets
import shutil
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator

from benchmarks.alignment_timing import Timing, time_call

from mint_lib.store import Store

LINK_BYTES_PER_SECOND = 10_000_000
CHECKPOINT_BYTES = 30_000_000
"""An adapter of rank 8 on SmolLM2-135M, 2.4 million weights in float32, and AdamW's two moments of each."""
_CHUNK_BYTES = 2**16
_MAKE_UP_SECONDS = 0.1
_OPEN_SECONDS = 10.0


def write_checkpoint(folder: pathlib.Path, *, num_bytes: int) -> pathlib.Path:
    """A checkpoint's files, of random bytes: one part adapter and two parts moments."""
    folder.mkdir()
    for name, parts in (("adapter_model.safetensors", 1), ("optimizer.bin", 2)):
        (folder / name).write_bytes(secrets.token_bytes(num_bytes * parts // 3))
    return folder


def time_save(store: Store, checkpoint: pathlib.Path, *, step: int, wait: bool) -> Timing:
    """Seconds until the training loop goes on; returns when the upload is done as well."""
    from mint_lib.training.checkpoint_writer import CheckpointWriter

    with CheckpointWriter(store, "stall", attempt=secrets.token_hex(8), rank=0, num_ranks=1) as writer:

        def save() -> None:
            folder = checkpoint.with_name(f"checkpoint-{step}")
            shutil.copytree(checkpoint, folder)
            writer.save(step, folder, wait=wait)

        timing = time_call(save)
    if writer.num_failed:
        raise AssertionError("the checkpoint was not written: nothing was measured")
    return timing


@contextlib.contextmanager
def slow_link(endpoint: str, *, bytes_per_second: float) -> Iterator[str]:
    """An address behind which the server at `endpoint` lies at the end of a link of that rate in each direction."""
    opened: queue.Queue[tuple[int, Callable[[], object]]] = queue.Queue()
    thread = threading.Thread(
        target=lambda: asyncio.run(_serve_link(endpoint, bytes_per_second, opened)), name="slow-link", daemon=True
    )
    thread.start()
    port, close = opened.get(timeout=_OPEN_SECONDS)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        close()
        thread.join()


async def _serve_link(
    endpoint: str, bytes_per_second: float, opened: "queue.Queue[tuple[int, Callable[[], object]]]"
) -> None:
    address = urllib.parse.urlsplit(endpoint)
    there, back = _Direction(bytes_per_second), _Direction(bytes_per_second)
    connections = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(address.hostname, address.port)
        both = asyncio.gather(there.carry(reader, far_writer), back.carry(far_reader, writer))
        connections.add(both)
        with contextlib.suppress(asyncio.CancelledError):
            await both
        connections.discard(both)

    closed, loop = asyncio.Event(), asyncio.get_running_loop()
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    opened.put((server.sockets[0].getsockname()[1], lambda: loop.call_soon_threadsafe(closed.set)))
    await closed.wait()
    server.close()
    for both in connections:
        both.cancel()


class _Direction:
    """What goes one way over a link, whatever connection it belongs to."""

    def __init__(self, bytes_per_second: float):
        self._bytes_per_second = bytes_per_second
        self._free_at = 0.0

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes until there is no more."""
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                # A link that woke up late makes up for it, or the rate would depend on what else the machine does.
                start = max(self._free_at, time.monotonic() - _MAKE_UP_SECONDS)
                self._free_at = start + len(data) / self._bytes_per_second
                await asyncio.sleep(self._free_at - time.monotonic())
                writer.write(data)
                await writer.drain()
        writer.close()
