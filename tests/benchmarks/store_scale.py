"""Many small rows as one version: written, verified, streamed back and added to, with requests, bytes and memory.

    OMP_NUM_THREADS=1 python tests/benchmarks/store_scale.py

Each number of rows is a process of its own against an embedded SeaweedFS: it writes preference pairs of some 300 bytes
as one version, reads every digest again, streams the rows back through their validation, and adds 1,000 rows in a next
version with the first as its base. Requests and sent bytes are counted where boto3 sends them. The peak of resident
memory is the process's own; flat memory means that ten times as many rows take no more.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mint_lib.local_store import local_store
from mint_lib.records import PreferencePair, StageRecord, Turn
from mint_lib.rows import pair_schema
from mint_lib.storage.verification import verify_version
from mint_lib.store import Store

NUM_ADDED = 1000
_RECORD = StageRecord(stage="preferences", config={}, inputs={}, code_version="benchmark")
_DIGEST = "sha256:" + "0" * 64


def make_pairs(begin: int, end: int) -> Iterator[PreferencePair]:
    """Pairs whose texts differ; some 300 bytes of text each."""
    for number in range(begin, end):
        yield PreferencePair(
            case_id=f"case-{number:08d}",
            prompt=(
                Turn(role="user", content=f"Patient {number}: short stature, webbed neck, stenosis {number % 97}."),
            ),
            chosen=f"Noonan syndrome {number % 89}",
            rejected=f"Turner syndrome {number % 83}",
            chosen_label_ids=(f"OMIM:{163950 + number % 89}",),
            rejected_label_ids=(f"OMIM:{100000 + number % 83}",),
            teacher_digest=_DIGEST,
            template_digest=_DIGEST,
            policy="top3-bottom3/ground-truth=none",
        )


class Meter:
    """Requests and bytes that a store's client sends."""

    def __init__(self, store: Store):
        self.requests = self.sent_bytes = 0
        store._s3.client.meta.events.register("before-send.s3", self._count)

    def _count(self, request: Any, **_: Any) -> None:
        self.requests += 1
        self.sent_bytes += int(request.headers.get("Content-Length", 0))


def measure(store: Store, num_rows: int) -> list[dict[str, object]]:
    """One line a phase, of this process."""
    meter = Meter(store)
    lines: list[dict[str, object]] = []

    def phase(name: str, work: Callable[[], int]) -> None:
        requests, sent = meter.requests, meter.sent_bytes
        began, began_cpu = time.perf_counter(), time.process_time()
        done = work()
        seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
        lines.append(
            {
                "phase": name,
                "rows": done,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "rows_per_second": round(done / seconds),
                "requests": meter.requests - requests,
                "sent_mb": round((meter.sent_bytes - sent) / 1e6, 3),
                "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
            }
        )

    def write() -> int:
        with store.write("preferences", "scale") as version:
            version.add_rows("train", make_pairs(0, num_rows), pair_schema())
            version.commit(_RECORD)
        return num_rows

    def verify() -> int:
        found = verify_version(store._s3, store._layout, store.resolve("preferences/scale"))
        if not found.is_whole:
            raise SystemExit(f"{len(found.damages)} files are damaged.")
        return num_rows

    def stream() -> int:
        reference, count = store.resolve("preferences/scale"), 0
        for row in store.iterate_rows(reference, "train", PreferencePair):
            if row.case_id != f"case-{count:08d}":
                raise SystemExit(f"row {count} is {row.case_id}.")
            count += 1
        return count

    def add() -> int:
        base = store.resolve("preferences/scale")
        with store.write("preferences", "scale", base=base) as version:
            version.carry_table("train")
            version.add_rows("train", make_pairs(num_rows, num_rows + NUM_ADDED), pair_schema())
            version.commit(_RECORD)
        return NUM_ADDED

    phase("connect", lambda: len(store.list_names("preferences")))
    phase("write", write)
    phase("verify", verify)
    phase("stream", stream)
    phase("add 1,000", add)
    phase("stream all", stream)
    lines.append({"objects": sum(1 for _ in store._s3.list_objects(store.settings.prefix))})
    return lines


def main() -> None:
    """Measure every number of rows in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--folder", type=Path, help="Where the bytes lie.")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        for line in measure(Store.from_environment(), arguments.child):
            print(json.dumps(line), flush=True)  # noqa: T201
        return
    with (
        tempfile.TemporaryDirectory(prefix="mint-scale-", dir=arguments.folder) as folder,
        local_store(Path(folder) / "s3") as variables,
    ):
        for num_rows in arguments.rows:
            environment = os.environ | variables | {"MINT_S3_PREFIX": f"scale-{num_rows}"}
            print(f"{num_rows} rows", flush=True)  # noqa: T201
            subprocess.run([sys.executable, __file__, "--child", str(num_rows)], env=environment, check=True)


if __name__ == "__main__":
    main()
