"""Splits of cases: who is dealt where, what stays together, and what a refusal names."""

import collections

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_lib.case_keys import CaseKey, make_key
from mint_lib.records import Case, Split
from mint_lib.splits import SplitWeights, describe_case_ids, prove_disjoint, split_cases, withhold_labels


def key(number: int, *, group: int, text: int, label: int, assigned: Split | None = None) -> CaseKey:
    case = Case(
        case_id=f"c{number}", group_id=f"g{group}", text=f"t{text}", label_id=f"D:{label}", source="x", synthetic=True
    )
    return make_key(case, place=number, contents=("text", "image"), assigned=assigned)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 3)),
        min_size=1,
        max_size=60,
    ),
    st.booleans(),
)
def test_split_cases_any_rows_keep_every_case_and_stay_disjoint(
    shape: list[tuple[int, int, int]], has_own_test: bool
) -> None:
    cases = [key(number, group=group, text=text, label=label) for number, (group, text, label) in enumerate(shape)]
    splits = split_cases(
        cases,
        SplitWeights(),
        by="patient",
        has_own_test=has_own_test,
        rng=np.random.default_rng(0),
        counts=collections.Counter(),
    )
    prove_disjoint(splits, by="patient")
    assert sorted(case for dealt in splits.values() for case in dealt) == sorted(cases)
    assert not (has_own_test and splits["test"])


def test_split_cases_many_small_labels_still_meet_the_weights_overall() -> None:
    splits = split_cases(
        [key(number, group=number, text=number, label=number // 2) for number in range(200)],
        SplitWeights(),
        by="patient",
        has_own_test=False,
        rng=np.random.default_rng(0),
        counts=collections.Counter(),
    )
    assert {split: len(cases) for split, cases in splits.items()} == {"train": 140, "validation": 30, "test": 30}


def test_withhold_labels_none_keeps_all_and_zero_keeps_no_label() -> None:
    cases = [key(0, group=0, text=0, label=1)]
    assert withhold_labels(cases, None, rng=np.random.default_rng(0)) == cases
    assert withhold_labels(cases, 0, rng=np.random.default_rng(0))[0].label_id is None


def test_describe_case_ids_shows_five_without_line_breaks_and_says_that_there_are_more() -> None:
    described = describe_case_ids({"torn": [f"a\n{number}" for number in range(6)], "late": ["b"]})
    assert described == r"late: 1 (b); torn: 6 (a\n0, a\n1, a\n2, a\n3, a\n4, ...)"
