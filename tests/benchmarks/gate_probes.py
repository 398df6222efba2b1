"""How often the data gate refuses poisoned data, and how often clean data: a line for each kind of poison.

    OMP_NUM_THREADS=1 python tests/benchmarks/gate_probes.py
    OMP_NUM_THREADS=1 python tests/benchmarks/gate_probes.py --sets 5 --patients-per-label 180
    OMP_NUM_THREADS=1 python tests/benchmarks/gate_probes.py --patients-per-label 60 --cases '{"source": "phenopackets",
        "config": {"path": "FILE", "where": {"usable": true}, "min_cases_per_label": 20}}'

Without `--cases` each set is simulated anew, from a seed that no threshold was chosen on: twelve diseases. With
`--cases`, a data source as a recipe names it, each set is drawn from its cases: labels by lot, and patients of each.
Such sets share cases, so that their intervals (Wilson, 95 %) are too narrow. Every set has ten batches by lot, of which
one holds a tenth of the patients and, but for spread flips, all of the poison. Pairs follow a teacher that errs at
random. What a set is refused for beside the probes is listed as well: it has nothing to do with the poison.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections import Counter
from collections.abc import Callable
from typing import Literal
from unittest import mock

import numpy as np
from scipy.stats import binomtest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from poisoned_cases import Kind, judge_cases, judge_pairs, outcome_of, poison_cases, read_patients, read_source

from mint_lib.gate import probe_cases
from mint_lib.gate.report import GateReport
from mint_lib.records import Case, Label

FIRST_SEED = 9000
POISONS: tuple[tuple[Kind, float], ...] = (
    ("spread", 0.0),
    ("spread", 0.01),
    ("spread", 0.05),
    ("batch", 0.01),
    ("batch", 0.05),
    ("target", 0.01),
    ("target", 0.05),
    ("trigger", 0.01),
    ("trigger", 0.05),
)
CHECKS = ("label_flips", "label_flips_by_batch", "trigger_phrase")
Judge = Callable[[list[Label], list[Case], Kind, float, int], GateReport]
Reads = Literal["text", "image"]


def judge_poisoned_cases(reads: Reads) -> Judge:
    """The verdict on cases of which a share is poisoned, for students that read this of them."""

    def judge(labels: list[Label], cases: list[Case], kind: Kind, rate: float, seed: int) -> GateReport:
        return judge_cases(labels, poison_cases(cases, kind=kind, rate=rate, seed=seed), reads=reads)

    return judge


def judge_poisoned_pairs(error_rate: float) -> Judge:
    """The verdict on pairs of a teacher that errs at this rate, of which a share is poisoned beside."""

    def judge(labels: list[Label], cases: list[Case], kind: Kind, rate: float, seed: int) -> GateReport:
        erring = poison_cases(cases, kind="spread", rate=error_rate, seed=1000 + seed)
        chosen = poison_cases(erring, kind=kind, rate=rate, seed=seed)
        true = poison_cases(cases, kind="spread", rate=0.0, seed=seed)
        told = [case.model_copy(update={"text": other.text}) for case, other in zip(true, chosen, strict=True)]
        return judge_pairs(labels, told, chosen)

    return judge


def draw_sets(
    labels: list[Label], cases: list[Case], *, num_sets: int, num_labels: int, patients_per_label: int
) -> list[tuple[list[Label], list[Case]]]:
    """Sets of `num_labels` labels, or all if there are fewer, with at most so many patients of each."""
    patients: dict[str, set[str]] = {}
    for case in cases:
        patients.setdefault(str(case.label_id), set()).add(case.group_id)
    sets = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_sets):
        rng = np.random.default_rng(seed)
        drawn = sorted(rng.permutation(sorted(patients))[:num_labels].tolist())
        kept = {(key, item) for key in drawn for item in rng.permutation(sorted(patients[key]))[:patients_per_label]}
        sets.append(
            (
                [label for label in labels if label.id in drawn],
                [case for case in cases if (case.label_id, case.group_id) in kept],
            )
        )
    return sets


def measure(name: str, judge: Judge, sets: list[tuple[list[Label], list[Case]]], kind: Kind, rate: float) -> str:
    """Shares of the sets that were refused, by check, and in which the poisoned batch was named alone."""
    refused = dict.fromkeys((*CHECKS, "any of these", "batch named"), 0)
    others: Counter[str] = Counter()
    for seed, (labels, cases) in enumerate(sets):
        report = judge(labels, cases, kind, rate, seed)
        found = [outcome_of(report, check) for check in CHECKS]
        for outcome in found:
            refused[outcome.check] += outcome.status == "refused"
        refused["any of these"] += any(outcome.status == "refused" for outcome in found)
        refused["batch named"] += ("poisoned",) in [outcome.batches for outcome in found[1:]]
        others.update(outcome.check for outcome in report.refusals if outcome.check not in CHECKS)
        others.update(f"{outcome.check} not applicable" for outcome in found if outcome.status == "not_applicable")
    shares = ", ".join(f"{check} {format_share(count, len(sets))}" for check, count in refused.items())
    beside = "".join(f", {check} {count / len(sets):.2f}" for check, count in sorted(others.items()))
    return f"{name}, {kind} at {100 * rate:g} %: {shares} of {len(sets)} sets{beside and f'; beside{beside[1:]}'}"


def format_share(count: int, total: int) -> str:
    """A share with its interval."""
    low, high = binomtest(count, total).proportion_ci(method="wilson")
    return f"{count / total:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Print a line for each kind of poison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--patients-per-label", type=int, default=70)
    parser.add_argument("--cases", type=json.loads, help="a data source as JSON: {source: ..., config: {...}}")
    parser.add_argument("--labels-per-set", type=int, default=12, help="with --cases")
    parser.add_argument("--reads", choices=("text", "image"), default="text", help="what a student reads of a case")
    parser.add_argument("--cases-only", action="store_true", help="judge no pairs")
    arguments = parser.parse_args()
    if arguments.cases:
        labels, cases = read_source(arguments.cases["source"], **arguments.cases["config"])
        sets = draw_sets(
            labels,
            cases,
            num_sets=arguments.sets,
            num_labels=arguments.labels_per_set,
            patients_per_label=arguments.patients_per_label,
        )
        sys.stdout.write(f"{len(cases)} cases of {len({case.group_id for case in cases})} patients at hand\n")
    else:
        seeds = range(FIRST_SEED, FIRST_SEED + arguments.sets)
        sets = [read_patients(seed=seed, patients_per_label=arguments.patients_per_label) for seed in seeds]
    sizes = [len(cases) for _, cases in sets]
    sys.stdout.write(f"{len(sets)} sets of {min(sizes)} to {max(sizes)} cases\n")
    judges = {"cases": judge_poisoned_cases(arguments.reads)}
    if arguments.reads == "text" and not arguments.cases_only:
        judges |= {
            f"pairs of a teacher that errs in {100 * rate:g} %": judge_poisoned_pairs(rate) for rate in (0.1, 0.25)
        }
    # Sets are judged many times over, and their images are described once.
    with mock.patch.object(probe_cases, "describe_image", functools.cache(probe_cases.describe_image)):
        for name, judge in judges.items():
            for kind, rate in POISONS:
                if arguments.reads == "text" or kind != "trigger":
                    sys.stdout.write(measure(name, judge, sets, kind, rate) + "\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
