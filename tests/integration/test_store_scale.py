"""A version of many small rows: memory that does not grow with them, and additions that send only what is new."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mint_lib.records import PreferencePair, StageRecord
from mint_lib.rows import pair_schema
from mint_lib.store import Store

RECORD = StageRecord(stage="preferences", config={}, inputs={}, code_version="test")
ROOT = Path(__file__).parents[2]
WRITE_AND_STREAM = """
import resource, sys
from test_store_scale import make_pairs, write_pairs
from mint_lib.records import PreferencePair
from mint_lib.store import Store

store = Store.from_environment()
reference = write_pairs(store, int(sys.argv[1]))
assert sum(1 for _ in store.iterate_rows(reference, "train", PreferencePair)) == int(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def make_pairs(begin: int, end: int) -> Iterator[PreferencePair]:
    for number in range(begin, end):
        yield PreferencePair.model_validate(
            {
                "case_id": f"case-{number}",
                "prompt": [{"role": "user", "content": f"Patient {number} has a webbed neck."}],
                "chosen": f"Noonan syndrome {number}",
                "rejected": "Turner syndrome",
                "chosen_label_ids": ["OMIM:163950"],
                "rejected_label_ids": ["OMIM:1"],
                "teacher_digest": "sha256:0",
                "template_digest": "sha256:0",
                "policy": "test",
            }
        )


def write_pairs(store: Store, num_rows: int) -> Any:
    with store.write("preferences", "scale") as version:
        version.add_rows("train", make_pairs(0, num_rows), pair_schema())
        return version.commit(RECORD)


def test_memory_of_ten_times_as_many_rows_is_the_same(store: Store):
    peaks = {}
    for num_rows in (4_000, 40_000):
        command = [sys.executable, "-c", WRITE_AND_STREAM, str(num_rows)]
        path = f"{ROOT}:{Path(__file__).parent}"
        environment = {**os.environ, "PYTHONPATH": path, "MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        peaks[num_rows] = int(done.stdout) / 1024
    # As Python objects the 36,000 more rows would take some 100 MB. A file is in memory as one part, compressed, once.
    assert peaks[40_000] < peaks[4_000] + 12, peaks


def test_rows_added_to_a_version_send_only_the_new_ones(store: Store, monkeypatch: pytest.MonkeyPatch):
    base = write_pairs(store, 20_000)
    sent: list[tuple[str, int]] = []

    def count(request: Any, **_: Any) -> None:
        sent.append((request.method, int(request.headers.get("Content-Length", 0))))

    store._s3.client.meta.events.register("before-send.s3", count)
    with store.write("preferences", "scale", base=base) as version:
        version.carry_table("train")
        version.add_rows("train", make_pairs(20_000, 20_100), pair_schema())
        grown = version.commit(RECORD)
    store._s3.client.meta.events.unregister("before-send.s3", count)
    size_of_base = sum(entry.size for entry in store.files(base).values())
    assert sum(size for _, size in sent) < size_of_base / 5
    # Claim, hold, shard and manifest (the record equals the base's); the base's manifest twice and one listing.
    assert [method for method, _ in sent].count("PUT") <= 5
    assert [method for method, _ in sent].count("GET") <= 3
    rows = [row.case_id for row in store.iterate_rows(grown, "train", PreferencePair)]
    assert rows == [f"case-{number}" for number in range(20_100)]
