"""The alignment engine against what it is measured by, side by side in one run: one line for each target.

    OMP_NUM_THREADS=2 python tests/benchmarks/alignment.py
    OMP_NUM_THREADS=2 python tests/benchmarks/alignment.py --only trees --rounds 7

A line says what was compared: the median ratio (its range), the target, whether it is met, and the seconds of wall and
CPU of both sides. Losses, gradients and token ids are compared; where they differ the run ends without the line. Peers
are TRL's ORPOTrainer and, for one line, Liger-Kernel's ORPO loss. Weights are random in SmolLM2-135M's shape, or its
own in whole runs; the adapter has rank 8 on every linear layer, in float32. The modules `alignment_*` beside this file
say what each side does. On two cores all of it takes less than 20 minutes; nothing else should run meanwhile.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator

# Processes that are started find these modules too, Ray's workers among them.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))

from benchmarks import alignment_rows, alignment_runs, alignment_stall, alignment_steps
from benchmarks.alignment_steps import Likelihood
from benchmarks.alignment_timing import Target, compare_figures, compare_timings, take_turns

from mint_lib.store import Store

NUM_PAIRS = 600
_PACKAGES = ("torch", "transformers", "trl", "liger-kernel", "peft", "ray")
Lines = Iterator[str]


def measure_pairs(num_rounds: int) -> Lines:
    """An ORPO step on a ragged batch of pairs, prompts 16 times as long as answers."""
    model = alignment_steps.build_model()
    rows = alignment_steps.draw_rows(alignment_steps.RAGGED_PAIRS, vocabulary=model.config.vocab_size)
    cases: list[tuple[str, Likelihood]] = [("TRL", "prompt_and_answer"), ("TRL", "answer")]
    if importlib.util.find_spec("liger_kernel"):
        cases.append(("Liger", "prompt_and_answer"))
    else:
        yield "ORPO step, pairs, against Liger: NOT MEASURED, liger-kernel is not installed"
    likelihoods: tuple[Likelihood, ...] = ("prompt_and_answer", "answer")
    ours = {likelihood: alignment_steps.make_ours(model, rows, likelihood) for likelihood in likelihoods}
    peers = {case: alignment_steps.MAKERS[case[0]](model, rows, case[1]) for case in cases}
    for (peer, likelihood), step in peers.items():
        alignment_steps.check_equal(model, ours[likelihood], step, what=f"pairs, {likelihood}, {peer}")
    sides = {f"ours {likelihood}": step for likelihood, step in ours.items()}
    sides |= {f"{peer} {likelihood}": step for (peer, likelihood), step in peers.items()}
    timings = take_turns(sides, num_rounds=num_rounds)
    targets = {("TRL", "prompt_and_answer"): 1.9, ("TRL", "answer"): 2.2, ("Liger", "prompt_and_answer"): 1.6}
    for peer, likelihood in cases:
        yield compare_timings(
            f"ORPO step, ragged pairs 16:1, likelihood of {likelihood}, {peer} / ours",
            timings[f"{peer} {likelihood}"],
            timings[f"ours {likelihood}"],
            Target("at least", targets[peer, likelihood]),
        )


def measure_trees(num_rounds: int) -> Lines:
    """An ORPO step on four pairs of one prompt, whose eight answers all differ."""
    model = alignment_steps.build_model()
    rows = alignment_steps.draw_rows(alignment_steps.TREE, vocabulary=model.config.vocab_size)
    sides = {
        "TRL": alignment_steps.make_trl(model, rows, "prompt_and_answer"),
        "ours": alignment_steps.make_ours(model, rows, "prompt_and_answer"),
    }
    alignment_steps.check_equal(model, sides["ours"], sides["TRL"], what="trees")
    timings = take_turns(sides, num_rounds=num_rounds)
    yield compare_timings(
        "ORPO step, 4 pairs of a prompt, TRL / ours", timings["TRL"], timings["ours"], Target("at least", 4.5)
    )


def measure_memory(num_rounds: int) -> Lines:
    """The peak memory of a first step, above a process that has loaded the model."""
    for name, shape, most in (
        ("ragged pairs 16:1", alignment_steps.RAGGED_PAIRS, 0.55),
        ("4 pairs of a prompt", alignment_steps.TREE, 0.25),
    ):
        peaks: dict[str, list[float]] = {"ours": [], "TRL": []}
        for _ in range(min(2, num_rounds)):
            for side, found in peaks.items():
                found.append(alignment_steps.measure_peak(side, shape, "prompt_and_answer"))
        ratios = [ours / trl for ours, trl in zip(*peaks.values(), strict=True)]
        note = f"GiB {peaks['ours'][0]:.2f} / {peaks['TRL'][0]:.2f}"
        yield compare_figures(
            f"peak memory above the weights, {name}, ours / TRL", ratios, Target("at most", most), note=note
        )


def measure_rows(num_rounds: int) -> Lines:
    """Preparing pairs of some 500 tokens, each with a prompt of its own."""
    from mint_lib.student import StudentConfig, load_tokenizer

    tokenizer, pairs = load_tokenizer(StudentConfig()), alignment_rows.draw_pairs(NUM_PAIRS)
    with tempfile.TemporaryDirectory(prefix="mint-benchmark-") as scratch:
        ours = alignment_rows.make_ours(pairs, tokenizer, pathlib.Path(scratch))
        trl = alignment_rows.make_trl(pairs, tokenizer)
        if ours.read_ids(ours.prepare()) != trl.read_ids(trl.prepare()):
            raise AssertionError("rows: token ids differ")
        timings = take_turns({"TRL": trl.prepare, "ours": ours.prepare}, num_rounds=num_rounds)
    # Our tokenizer calls may use all cores, so the wall clock would flatter us.
    yield compare_timings(
        f"preparing {NUM_PAIRS} rows, TRL / ours", timings["TRL"], timings["ours"], Target("at least", 8.0), clock="cpu"
    )


def measure_ray(num_rounds: int) -> Lines:
    """An optimiser step of the alignment stage's worker on Ray Train against the same trainer in a plain loop."""
    config = alignment_runs.make_config(num_workers=1, cpus_per_worker=os.cpu_count() or 1)
    with _running_store() as store:
        preferences = alignment_runs.write_preferences(store)
        plain, on_ray = [], []
        for _ in range(_count_runs(num_rounds)):
            plain.append(alignment_runs.run_plain(config, store=store, preferences=preferences))
            on_ray.append(alignment_runs.run_on_ray(config, store=store, preferences=preferences))
            alignment_runs.check_losses(on_ray[-1].losses, plain[-1].losses, tolerance=alignment_steps.LOSS_TOLERANCE)
    yield compare_timings(
        "optimiser step, Ray Train / plain loop",
        [run.median for run in on_ray],
        [run.median for run in plain],
        Target("at most", 1.03),
    )


def measure_workers(num_rounds: int) -> Lines:
    """An optimiser step of one worker against two gloo workers, one thread each, on the same batch."""
    from mint_lib.training.on_ray import ray_session

    configs = [alignment_runs.make_config(num_workers=number, cpus_per_worker=1) for number in (1, 2)]
    runs: list[list[alignment_runs.RunResult]] = []
    with _running_store() as store, ray_session(2):
        preferences = alignment_runs.write_preferences(store)
        for _ in range(_count_runs(num_rounds)):
            runs.append([alignment_runs.run_on_ray(config, store=store, preferences=preferences) for config in configs])
            one, two = runs[-1]
            # Sums in another order each step, on weights that drift apart by it.
            alignment_runs.check_losses(two.losses, one.losses, tolerance=10 * alignment_steps.LOSS_TOLERANCE)
    yield compare_timings(
        "optimiser step, one worker / two gloo workers, one thread each",
        [one.median for one, _ in runs],
        [two.median for _, two in runs],
        Target("at least", 1.7),
    )


def measure_stall(num_rounds: int) -> Lines:
    """How long the training loop stands still for a checkpoint, asynchronous against waited for."""
    rate, size = alignment_stall.LINK_BYTES_PER_SECOND, alignment_stall.CHECKPOINT_BYTES
    waited, not_waited = [], []
    with (
        tempfile.TemporaryDirectory(prefix="mint-benchmark-") as scratch,
        _running_store() as near,
        alignment_stall.slow_link(near.settings.endpoint_url, bytes_per_second=rate) as address,
    ):
        far = Store(near.settings.model_copy(update={"endpoint_url": address}))
        folder = alignment_stall.write_checkpoint(pathlib.Path(scratch) / "checkpoint", num_bytes=size)
        for number in range(num_rounds):
            not_waited.append(alignment_stall.time_save(far, folder, step=2 * number, wait=False))
            waited.append(alignment_stall.time_save(far, folder, step=2 * number + 1, wait=True))
    yield compare_timings(
        f"stall for a checkpoint of {size // 10**6} MB at {rate // 10**6} MB/s, asynchronous / synchronous",
        not_waited,
        waited,
        Target("at most", 0.1),
    )


def _count_runs(num_rounds: int) -> int:
    """Whole runs of each side: each takes a minute and has several steps in it."""
    return max(1, (num_rounds + 1) // 2)


@contextlib.contextmanager
def _running_store() -> Iterator[Store]:
    """A store on a real S3 server of its own, which processes that are started find in their environment too."""
    from mint_lib.local_store import local_store

    with tempfile.TemporaryDirectory(prefix="mint-benchmark-") as folder, local_store(pathlib.Path(folder)) as found:
        before = {name: os.environ.get(name) for name in found}
        os.environ.update(found)
        try:
            yield Store.from_environment()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def describe_machine() -> str:
    """What the figures depend on."""
    import torch

    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"machine: {cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, load {load} | Python {platform.python_version()}, "
        + ", ".join(versions)
    )


MEASURES: dict[str, Callable[[int], Lines]] = {
    "pairs": measure_pairs,
    "trees": measure_trees,
    "memory": measure_memory,
    "rows": measure_rows,
    "stall": measure_stall,
    "ray": measure_ray,
    "workers": measure_workers,
}


def main() -> None:
    """Print the lines of what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=MEASURES, help="one of the measures")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name, measure in MEASURES.items():
        if arguments.only in (None, name):
            for line in measure(arguments.rounds):
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
    sys.stdout.write(describe_machine() + "\n")


if __name__ == "__main__":
    main()
