"""The store against a bare boto3 multipart copy of the same bytes, on the same server, turn by turn in one run.

    OMP_NUM_THREADS=1 python tests/benchmarks/store_throughput.py

One file of random bytes goes to an embedded SeaweedFS and comes back: by `upload_file` and `download_file` of boto3
with their defaults (ten threads), and by a version of the store (`add_file`, `commit`, `download`), which checks every
byte on both ways. The order changes from round to round. Printed are the medians, and the median and the range of the
rounds' ratios of times (boto3's / ours); above 1 ours is faster. The CPU seconds are those of this process alone.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import boto3

from mint_lib.local_store import local_store
from mint_lib.records import Reference, StageRecord
from mint_lib.store import Store

_BLOCK_BYTES = 2**24
_RECORD = StageRecord(stage="data", config={}, inputs={}, code_version="benchmark")


class Taken(NamedTuple):
    """What one copy took."""

    wall_seconds: float
    cpu_seconds: float


def take(copy: Callable[[], object]) -> Taken:
    """What a copy takes, from its call to its return."""
    began, began_cpu = time.perf_counter(), time.process_time()
    copy()
    return Taken(time.perf_counter() - began, time.process_time() - began_cpu)


def measure_round(
    store: Store, client: Any, source: Path, target: Path, *, ours_first: bool
) -> dict[tuple[str, str], Taken]:
    """One upload and one download by each of the two."""
    settings = store.settings
    bare_key = f"{settings.prefix}/bare/file.bin"
    written: list[Reference] = []

    def write() -> None:
        with store.write("base", "copy") as version:
            version.add_file("file.bin", source)
            written.append(version.commit(_RECORD))

    ways: dict[tuple[str, str], Callable[[], object]] = {
        ("upload", "boto3"): lambda: client.upload_file(str(source), settings.bucket, bare_key),
        ("upload", "store"): write,
        ("download", "boto3"): lambda: client.download_file(settings.bucket, bare_key, str(target / "bare.bin")),
        ("download", "store"): lambda: store.download(written[0], target, "file.bin"),
    }
    taken = {}
    for direction in ("upload", "download"):
        for who in ("store", "boto3") if ours_first else ("boto3", "store"):
            taken[direction, who] = take(ways[direction, who])
    for name in ("bare.bin", "file.bin"):
        if (target / name).stat().st_size != source.stat().st_size:
            raise SystemExit(f"{name} did not come back whole.")
        (target / name).unlink()
    store.remove(written[0])
    client.delete_object(Bucket=settings.bucket, Key=bare_key)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="Where the bytes lie; one in memory leaves the disk out of it.")
    arguments = parser.parse_args()
    size = arguments.megabytes * 10**6
    with tempfile.TemporaryDirectory(prefix="mint-throughput-", dir=arguments.folder) as name:
        folder = Path(name)
        source = folder / "source.bin"
        with source.open("wb") as file:
            for begin in range(0, size, _BLOCK_BYTES):
                file.write(os.urandom(min(_BLOCK_BYTES, size - begin)))
        with local_store(folder / "s3") as variables:
            os.environ.update(variables, MINT_S3_PREFIX="benchmark")
            store = Store.from_environment()
            client = boto3.client("s3", endpoint_url=store.settings.endpoint_url, region_name=store.settings.region)
            measure_round(store, client, source, folder, ours_first=True)
            rounds = [
                measure_round(store, client, source, folder, ours_first=bool(index % 2))
                for index in range(arguments.rounds)
            ]
    for direction in ("upload", "download"):
        for who in ("boto3", "store"):
            walls = [taken[direction, who].wall_seconds for taken in rounds]
            cpus = [taken[direction, who].cpu_seconds for taken in rounds]
            wall = statistics.median(walls)
            print(  # noqa: T201
                f"{direction:8} {who:5} {wall:6.2f} s ({min(walls):.2f} to {max(walls):.2f}), "
                f"{size / wall / 1e6:5.0f} MB/s, {statistics.median(cpus):5.2f} CPU s"
            )
        ratios = [taken[direction, "boto3"].wall_seconds / taken[direction, "store"].wall_seconds for taken in rounds]
        print(  # noqa: T201
            f"{direction:8} ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
