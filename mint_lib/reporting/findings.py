"""Findings: from measurements of systems to estimates, paired comparisons, slices and the gate's decision.

Goes in: for every system the measurements of its runs, and the patient of every case. Comes out: the parts of an
`EvaluationReport`. It knows neither models nor the store. N is the number of cases.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict

from mint_lib.report_records import Comparison, Estimate, Gate, GateOutcome
from mint_lib.statistics import Array, GroupBootstrap, Measurement, correct_holm, permutation_test, sign_test

Measured = dict[str, list[dict[str, Measurement]]]
"""System to one dictionary of measurements for each of its runs."""
PairedTest = Literal["sign", "permutation"]
SystemEstimates = dict[str, dict[str, Estimate]]
"""System to metric to estimate."""


class Resampling(NamedTuple):
    """How intervals are made."""

    draws: int
    seed: int
    confidence: float

    def of(self, groups: Sequence[str]) -> GroupBootstrap:
        """The bootstrap over these cases' groups."""
        return GroupBootstrap(groups, draws=self.draws, seed=self.seed, confidence=self.confidence)


class GateRule(BaseModel):
    """One threshold that a student must meet before it may be promoted."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    metric: str
    """Name of a metric, for instance `top_1`."""
    system: str | None = None
    """System the rule is on; None: the main student."""
    over: str | None = None
    """The rule is on the lead over this system, for instance `base`; None: on the system's own value."""
    at_least: float
    """Least value; shares are 0 to 1."""
    bound: Literal["lower", "value"] = "lower"
    """Whether the lower end of the interval must reach it, or the value itself."""


def estimate_systems(measured: Measured, groups: Sequence[str], resampling: Resampling) -> SystemEstimates:
    """System to metric to estimate, over the metrics that all runs of a system have."""
    bootstrap = resampling.of(groups)
    return {
        name: {
            metric: bootstrap.estimate([run[metric] for run in runs])
            for metric in runs[0]
            if all(metric in run for run in runs)
        }
        for name, runs in measured.items()
    }


def compare_systems(
    main: str, tests: Mapping[str, PairedTest], measured: Measured, groups: Sequence[str], resampling: Resampling
) -> list[Comparison]:
    """`main` minus every other system, in each metric that has a paired test; metrics are means over cases.

    The runs of a system are averaged per case before the test; the interval resamples patients and runs.
    """
    bootstrap = resampling.of(groups)
    others = [name for name in measured if name != main]
    comparisons = []
    for metric, wanted in tests.items():
        runs = {name: [run[metric] for run in measured[name]] for name in (main, *others)}
        means = {name: np.mean([run.columns[:, 0] for run in found], axis=0) for name, found in runs.items()}
        differences = {name: means[main] - means[name] for name in others}
        tested = {name: _choose_test(wanted, differences[name]) for name in others}
        p_values = [
            sign_test(differences[name], groups)
            if tested[name] == "sign"
            else permutation_test(differences[name], groups, seed=resampling.seed)
            for name in others
        ]
        comparisons += [
            Comparison(
                metric=metric,
                system=main,
                other=name,
                difference=bootstrap.difference(runs[main], runs[name]),
                test=tested[name],
                p_value=p_value,
                p_adjusted=p_adjusted,
            )
            for name, p_value, p_adjusted in zip(others, p_values, correct_holm(p_values), strict=True)
        ]
    return comparisons


def estimate_slices(
    slices: Mapping[str, Sequence[str | None]],
    metrics: Sequence[str],
    measured: Measured,
    groups: Sequence[str],
    resampling: Resampling,
) -> dict[str, dict[str, SystemEstimates]]:
    """Slice to value to the systems' estimates on the cases of that value. None: the case is in no slice."""
    found: dict[str, dict[str, SystemEstimates]] = {}
    for slice_name, values in slices.items():
        for value in sorted({value for value in values if value}):
            mask_N = np.array([item == value for item in values])
            inside = {
                name: [{metric: run[metric].take(mask_N) for metric in metrics} for run in runs]
                for name, runs in measured.items()
            }
            inside_groups = [group for group, item in zip(groups, values, strict=True) if item == value]
            found.setdefault(slice_name, {})[value] = estimate_systems(inside, inside_groups, resampling)
    return found


def decide_gate(
    rules: Sequence[GateRule], main: str, measured: Measured, groups: Sequence[str], resampling: Resampling
) -> Gate:
    """Every rule with what was observed. A system, a metric or a number that is missing fails its rule."""
    bootstrap = resampling.of(groups)
    outcomes = []
    for rule in rules:
        names = [rule.system or main, *([rule.over] if rule.over else [])]
        runs = [[run[rule.metric] for run in measured.get(name, []) if rule.metric in run] for name in names]
        observed = None
        if all(runs):
            estimate = bootstrap.difference(runs[0], runs[1]) if rule.over else bootstrap.estimate(runs[0])
            observed = estimate.low if rule.bound == "lower" else estimate.value
        outcomes.append(
            GateOutcome(
                metric=rule.metric,
                system=names[0],
                over=rule.over,
                bound=rule.bound,
                at_least=rule.at_least,
                observed=observed,
                passed=observed is not None and observed >= rule.at_least,
            )
        )
    return Gate(passed=bool(outcomes) and all(outcome.passed for outcome in outcomes), rules=tuple(outcomes))


def _choose_test(wanted: PairedTest, differences_N: Array) -> PairedTest:
    """`wanted`, but a sign test only where every case is won, tied or lost whole: a shared rank is no whole hit."""
    return "permutation" if np.any(differences_N != np.rint(differences_N)) else wanted
