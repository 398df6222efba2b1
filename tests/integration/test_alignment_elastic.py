"""Elastic training on a cluster of two nodes, for real: one of them dies in mid-run, and the other finishes alone."""

import pathlib
import threading
import time
from collections.abc import Iterator

import pytest
import ray
from faulty_alignment import NUM_STEPS, break_training, hash_files, read_history, run_alignment
from ray.cluster_utils import Cluster

from mint_lib.store import Store

PATIENCE_SECONDS = 300


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes with room for one worker each; this process is connected to the first."""
    with pytest.MonkeyPatch.context() as patch:
        # Ray asks for as many workers as before until it has heard of a node's death: it may give that up earlier.
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            ray.init(address=cluster.address, log_to_driver=False)
            cluster.add_node(num_cpus=1)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def test_elastic_training_loses_a_node_and_finishes_on_the_other(
    cluster: Cluster, store: Store, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    marker = tmp_path / "waits"
    break_training(monkeypatch, "wait", marker)

    def remove_a_node() -> None:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while not marker.exists() and time.monotonic() < give_up:
            time.sleep(0.05)
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        marker.write_text("go on")

    remover = threading.Thread(target=remove_a_node, daemon=True)
    remover.start()
    shrunk = run_alignment(store, num_workers=2, min_workers=1)
    remover.join()
    assert [node["Alive"] for node in ray.nodes()].count(False) == 1
    monkeypatch.undo()
    # There is room for one worker from the start, and no more than one is needed.
    alone = run_alignment(store, num_workers=2, min_workers=1)
    assert store.record(shrunk).counts == store.record(alone).counts
    assert store.record(alone).counts["num_steps"] == NUM_STEPS
    one = run_alignment(store)
    assert hash_files(store, alone) == hash_files(store, one)
    for kind in ("train", "validation"):
        rows, others = read_history(store, shrunk, kind), read_history(store, one, kind)
        assert [row["step"] for row in rows] == [row["step"] for row in others]
        # Two workers add the parts of a gradient in another order than one, in float32.
        losses = [row["loss"] for row in rows]
        assert losses == pytest.approx([row["loss"] for row in others], rel=1e-4)
