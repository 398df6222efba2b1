"""How often the data gate refuses poisoned data, and how often clean data: a line for each kind of poison.

    OMP_NUM_THREADS=1 python tests/benchmarks/gate_probes.py
    OMP_NUM_THREADS=1 python tests/benchmarks/gate_probes.py --sets 5 --patients-per-label 180

Each set is simulated anew, from a seed that no threshold was chosen on: twelve diseases, ten batches of which one holds
a tenth of the patients and, but for spread flips, all of the poison. Pairs follow a teacher that errs at random.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from poisoned_cases import Kind, judge_cases, judge_pairs, outcome_of, poison_cases, read_patients

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


def judge_poisoned_cases(labels: list[Label], cases: list[Case], kind: Kind, rate: float, seed: int) -> GateReport:
    """The verdict on cases of which a share is poisoned."""
    return judge_cases(labels, poison_cases(cases, kind=kind, rate=rate, seed=seed))


def judge_poisoned_pairs(error_rate: float) -> Judge:
    """The verdict on pairs of a teacher that errs at this rate, of which a share is poisoned beside."""

    def judge(labels: list[Label], cases: list[Case], kind: Kind, rate: float, seed: int) -> GateReport:
        erring = poison_cases(cases, kind="spread", rate=error_rate, seed=1000 + seed)
        chosen = poison_cases(erring, kind=kind, rate=rate, seed=seed)
        true = poison_cases(cases, kind="spread", rate=0.0, seed=seed)
        told = [case.model_copy(update={"text": other.text}) for case, other in zip(true, chosen, strict=True)]
        return judge_pairs(labels, told, chosen)

    return judge


def measure(name: str, judge: Judge, sets: list[tuple[list[Label], list[Case]]], kind: Kind, rate: float) -> str:
    """Shares of the sets that were refused, by check, and in which the poisoned batch was named alone."""
    refused = dict.fromkeys(("any", *CHECKS, "batch named"), 0)
    for seed, (labels, cases) in enumerate(sets):
        report = judge(labels, cases, kind, rate, seed)
        refused["any"] += not report.passed
        for check in CHECKS:
            refused[check] += outcome_of(report, check).status == "refused"
        named = [outcome_of(report, check).batches for check in CHECKS[1:]]
        refused["batch named"] += ("poisoned",) in named
    shares = ", ".join(f"{check} {count / len(sets):.2f}" for check, count in refused.items())
    return f"{name}, {kind} at {100 * rate:g} %: refused by {shares} ({len(sets)} sets)"


def main() -> None:
    """Print a line for each kind of poison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--patients-per-label", type=int, default=70)
    arguments = parser.parse_args()
    seeds = range(FIRST_SEED, FIRST_SEED + arguments.sets)
    sets = [read_patients(seed=seed, patients_per_label=arguments.patients_per_label) for seed in seeds]
    judges = {"cases": judge_poisoned_cases}
    judges |= {f"pairs of a teacher that errs in {100 * rate:g} %": judge_poisoned_pairs(rate) for rate in (0.1, 0.25)}
    for name, judge in judges.items():
        for kind, rate in POISONS:
            sys.stdout.write(measure(name, judge, sets, kind, rate) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
