"""What the autoscaling rule does with a day of load: a simulation, as a picture and as figures.

    PYTHONPATH=tests python tests/benchmarks/autoscaling.py

draws helm/autoscaling.svg and prints a table. How quick one replica is was recorded from a real server and lies in
recorded_replica.json. To record it anew, while `mint serve model/quickstart` runs in the same folder:

    PYTHONPATH=tests python tests/benchmarks/autoscaling.py --record

The simulation itself is fleet.py, the policies are scaling.py; tests/unit/test_autoscaling.py proves with promtool that
they compute the rules of helm/files/serving-autoscaling.yaml as Prometheus does.
"""

import argparse
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
from benchmarks.fleet import MAX_BATCH, RECORDED, Outcome, draw_arrivals, load_curve, simulate
from benchmarks.scaling import Policy

PICTURE = pathlib.Path(__file__).parents[2] / "helm" / "autoscaling.svg"
LEVELS = (1, 2, 4, 8)
"""Clients that ask at once while a replica is recorded."""
POLICIES = {
    "KEDA: requests and queue wait": Policy(kind="requests", min_replicas=2, max_replicas=10),
    "HPA: CPU at 70 %": Policy(kind="cpu", min_replicas=2, max_replicas=10),
    "2 replicas, always": Policy(kind="fixed", min_replicas=2, max_replicas=2),
    "6 replicas, always": Policy(kind="fixed", min_replicas=6, max_replicas=6),
}
COLOURS = ("#0b6e4f", "#c8553d", "#8d8d8d", "#3d5a80")
DAY_SECONDS = 24 * 3600
PEAK_REPLICAS = 5.0
"""Load of the busiest hour, without bursts, in replicas that are always busy."""
BURSTS = ((3.5 * 3600, 600.0, 12.0), (10.5 * 3600, 900.0, 1.8), (18.5 * 3600, 300.0, 2.5))
"""Begin, length in seconds, and how many times the usual load."""
OUTAGES = ((20 * 3600.0, 20.5 * 3600.0),)
"""When nothing can be scraped."""
EVICTIONS = (7.1 * 3600, 12.2 * 3600, 17.9 * 3600)
"""When a pod is lost with its node and replaced."""


def record(seconds: float) -> dict[str, Any]:
    """Ask the server that `mint serve` started here with more and more clients at once, and note how quick it is."""
    from pipelines.ask import read_connection
    from pipelines.serve import CONNECTION

    connection = read_connection(CONNECTION)
    token = connection.token_file.read_text().strip() if connection.token_file else ""
    headers = {"Authorization": f"Bearer {token}"}
    path = f"/v1/models/{connection.models[0]}:predict"
    numbers = itertools.count()

    def read_cpu_seconds() -> float:
        text = httpx.get(f"{connection.url}/metrics", headers=headers, timeout=60, trust_env=False).text
        found = re.search(r"^process_cpu_seconds_total (\S+)$", text, re.MULTILINE)
        if found is None:
            raise SystemExit("the server's metrics hold no CPU seconds")
        return float(found[1])

    def ask_until(end: float, waits: list[float]) -> None:
        with httpx.Client(base_url=connection.url, headers=headers, timeout=300, trust_env=False) as client:
            while time.monotonic() < end:
                text = f"A boy of {next(numbers)} days with short stature, pulmonary stenosis and a webbed neck."
                began = time.monotonic()
                client.post(path, json={"instances": [{"text": text}]}).raise_for_status()
                waits.append(time.monotonic() - began)

    levels = []
    for num_clients in (1, *LEVELS):  # the first one warms up
        waits: list[float] = []
        began, cpu_before = time.monotonic(), read_cpu_seconds()
        clients = [threading.Thread(target=ask_until, args=(began + seconds, waits)) for _ in range(num_clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        took, cpu_seconds = time.monotonic() - began, read_cpu_seconds() - cpu_before
        levels.append(
            {
                "num_clients": num_clients,
                "requests_per_second": round(len(waits) / took, 3),
                "mean_seconds": round(sum(waits) / len(waits), 3),
                "cpu_seconds_per_request": round(cpu_seconds / len(waits), 3),
            }
        )
    return {
        "what": "SmolLM2-135M with a quickstart student ranks 12 labels; prompts share their beginning",
        "num_cores": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "seconds_per_level": seconds,
        "levels": levels[1:],
    }


def list_day_rates(peak: float) -> list[tuple[float, float]]:
    """A working day of requests per second: night, morning, lunch, afternoon, evening, and three bursts."""
    hours = {0: 0.08, 6: 0.08, 8: 0.5, 10: 0.8, 12: 0.65, 13: 0.6, 15: 1.0, 17: 0.7, 19: 0.3, 22: 0.12, 24: 0.08}
    rates = [(hour * 3600.0, share * peak) for hour, share in hours.items()]
    for begin, seconds, factor in BURSTS:
        after = [rate for rate in rates if rate[0] > begin + seconds]
        before = [rate for rate in rates if rate[0] < begin]
        level = _read_rate(rates, begin)
        burst = [
            (begin, level),
            (begin + 1, factor * level),
            (begin + seconds, factor * level),
            (begin + seconds + 1, level),
        ]
        rates = [*before, *burst, *after]
    return rates


def _read_rate(rates: Sequence[tuple[float, float]], time_seconds: float) -> float:
    for (left, left_rate), (right, right_rate) in itertools.pairwise(rates):
        if left <= time_seconds <= right:
            return left_rate + (time_seconds - left) / (right - left) * (right_rate - left_rate)
    raise ValueError(f"no rate at {time_seconds} s")


def draw_picture(outcomes: dict[str, Outcome], rates: Sequence[tuple[float, float]], capacity: float) -> None:
    """Load, replicas and wait over the day, as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "mint", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    import matplotlib.pyplot as plt

    figure, (load, replicas, waits) = plt.subplots(3, 1, sharex=True, figsize=(10, 8), layout="constrained")
    load.plot([at / 3600 for at, _ in rates], [rate / capacity for _, rate in rates], color="black", lw=1)
    load.set_ylabel("load, in replicas\nthat are always busy")
    load.set_title("A day of load, and what each policy makes of it (simulated from a recorded replica)", loc="left")
    for (name, outcome), colour in zip(outcomes.items(), COLOURS, strict=True):
        hours = [at / 3600 for at in outcome.times]
        if outcome.policy.kind != "fixed":
            replicas.step(hours, outcome.replicas, color=colour, lw=1.4, where="post")
        at, wait = list_wait_quantiles(outcome, quantile=0.95)
        waits.plot([second / 3600 for second in at], wait, color=colour, lw=1.1, label=name)
    replicas.set_ylabel("replicas")
    waits.set_ylabel("wait of 95 %\nof the requests, s")
    waits.set_yscale("symlog", linthresh=0.1)
    waits.set_yticks([0, 0.1, 1, 10, 60], ["0", "0.1", "1", "10", "60"])
    waits.set_ylim(0, 100)
    figure.legend(*waits.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    waits.set_xlabel("hour of the day")
    waits.set_xticks(range(0, 25, 2))
    waits.set_xlim(0, 24)
    load.set_ylim(0, 8)
    for axes in (load, replicas, waits):
        axes.grid(color="#dddddd", lw=0.5)
        for begin, end in OUTAGES:
            axes.axvspan(begin / 3600, end / 3600, color="#f2c14e", alpha=0.35, lw=0)
    load.annotate(
        "no metrics",
        ((OUTAGES[0][0] + OUTAGES[0][1]) / 7200, 0),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
    figure.savefig(PICTURE, metadata={"Date": None})


def list_wait_quantiles(
    outcome: Outcome, *, quantile: float, bin_seconds: int = 300
) -> tuple[list[float], list[float]]:
    """This quantile of the waits in each five minutes; a refused request counts as 60 s, its deadline."""
    bins: dict[int, list[float]] = {}
    for arrived, wait in itertools.chain(outcome.arrivals, ((arrived, 60.0) for arrived in outcome.refused)):
        bins.setdefault(int(arrived // bin_seconds), []).append(wait)
    points = sorted((number, sorted(waits)) for number, waits in bins.items())
    return (
        [(number + 0.5) * bin_seconds for number, _ in points],
        [waits[int(quantile * len(waits))] for _, waits in points],
    )


def compare() -> None:
    """One day under every policy: the picture and a table."""
    curve = load_curve()
    capacity = curve.requests_per_second[MAX_BATCH]
    rates = list_day_rates(PEAK_REPLICAS * capacity)
    arrivals = draw_arrivals(rates, seed=1)
    say = sys.stdout.write
    say(f"{len(arrivals)} requests in a day; a replica answers {capacity:.2f} a second\n\n")
    say("| policy | replica hours | most replicas | wait p50 s | p95 s | p99 s | refused % | loading pods removed |\n")
    say("|---|---|---|---|---|---|---|---|\n")
    outcomes = {}
    for name, policy in POLICIES.items():
        outcome = simulate(arrivals, policy, curve=curve, seconds=DAY_SECONDS, outages=OUTAGES, evictions=EVICTIONS)
        outcomes[name] = outcome
        refused = 100 * len(outcome.refused) / len(arrivals)
        quantiles = " | ".join(f"{outcome.find_wait(quantile):.1f}" for quantile in (0.5, 0.95, 0.99))
        say(
            f"| {name} | {outcome.replica_hours:.0f} | {max(outcome.replicas)} | {quantiles} | {refused:.2f} "
            f"| {outcome.num_killed_loading} |\n"
        )
    draw_picture(outcomes, rates, capacity)


def main() -> None:
    """Record, or simulate and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="record one replica instead")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each number of clients that is recorded")
    arguments = parser.parse_args()
    if arguments.record:
        RECORDED.write_text(json.dumps(record(arguments.seconds), indent=2) + "\n")
    else:
        compare()


if __name__ == "__main__":
    main()
