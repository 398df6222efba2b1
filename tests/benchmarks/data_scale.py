"""The data stage over many images: time and peak memory for a number of cases and for ten times as many.

    OMP_NUM_THREADS=1 python tests/benchmarks/data_scale.py

Each number of cases is a process of its own against an embedded SeaweedFS. It reads a table of PNG images of 256 x 256
pixels (some 100 KB each, four a patient, written beforehand), splits them by patient, has the gate judge them and
commits a version. The peak of resident memory is that of the process. What grows is one key and one sketch a case.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mint_lib.data import DataConfig, prepare_cases
from mint_lib.local_store import local_store
from mint_lib.records import SPLITS
from mint_lib.store import Store

SIDE = 256
NUM_TISSUES = 8


def write_tiles(folder: Path, num_cases: int) -> int:
    """A table and its images, each a pattern with noise; returns their bytes."""
    lines, num_bytes = ["image,patient,label"], 0
    for number in range(num_cases):
        rng = np.random.default_rng(number)
        pattern = np.kron(rng.integers(0, 200, (8, 8, 3)), np.ones((SIDE // 8, SIDE // 8, 1)))
        pixels = (pattern + rng.integers(0, 8, (SIDE, SIDE, 3))).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        num_bytes += (folder / f"{number}.png").write_bytes(buffer.getvalue())
        lines.append(f"{number}.png,patient-{number // 4},tissue {number // 4 % NUM_TISSUES}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return num_bytes


def measure(folder: Path, store: Store) -> dict[str, object]:
    """One run of the stage in this process."""
    values = {"name": "scale", "seed": 1, "source": "image_table", "gate": {"label_flips": None}}
    config = DataConfig.model_validate(values | {"config": {"path": str(folder), "table": "table.csv"}})
    idle_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, began_cpu = time.perf_counter(), time.process_time()
    reference = prepare_cases(config, store=store)
    counts = store.record(reference).counts
    return {
        "cases": sum(counts[f"{split}/cases"] for split in SPLITS),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
        "idle_rss_mb": round(idle_kib * 1024 / 1e6, 1),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        "stored_mb": round(sum(entry.size for entry in store.files(reference).values()) / 1e6, 1),
    }


def main() -> None:
    """Measure every number of cases in a process of its own, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--folder", type=Path, help="Where the bytes lie.")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(measure(arguments.child, Store.from_environment())), flush=True)  # noqa: T201
        return
    with (
        tempfile.TemporaryDirectory(prefix="mint-scale-", dir=arguments.folder) as folder,
        local_store(Path(folder) / "s3") as variables,
    ):
        for num_cases in arguments.cases:
            tiles = Path(folder) / f"tiles-{num_cases}"
            tiles.mkdir()
            print(f"{num_cases} images, {write_tiles(tiles, num_cases) / 1e6:.0f} MB", flush=True)  # noqa: T201
            environment = os.environ | variables | {"MINT_S3_PREFIX": f"scale-{num_cases}"}
            subprocess.run([sys.executable, __file__, "--child", str(tiles)], env=environment, check=True)


if __name__ == "__main__":
    main()
