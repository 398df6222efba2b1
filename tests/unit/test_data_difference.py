"""What is held of rows, which rows belong together, and whether classes shifted: against slow, plain references."""

import itertools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_lib.data_difference.figures import (
    Figures,
    agree_on_unread,
    compute_shift_p_value,
    count_figures,
    describe_lengths,
    measure_shift,
)
from mint_lib.data_difference.row_digests import FIELDS, RowDigests, TableKind, match_rows, measure_overlap
from mint_lib.records import SPLITS, Case, Finding, PreferencePair, Ranking, Record, Split, Turn

Row = tuple[Record, Split]


def make_case(case_id: str = "c", **changes: Any) -> Case:
    values = {"group_id": "g", "text": "t", "source": "s", "synthetic": True}
    return Case(case_id=case_id, **(values | changes))


def make_pair(case_id: str = "c", **changes: Any) -> PreferencePair:
    values = {
        "prompt": (Turn(role="user", content="p"),),
        "chosen": "yes",
        "rejected": "no",
        "chosen_label_ids": ("A:1",),
        "rejected_label_ids": ("A:2",),
        "teacher_digest": "sha256:1",
        "template_digest": "sha256:2",
        "policy": "top1",
    }
    return PreferencePair(case_id=case_id, **(values | changes))


def make_ranking(case_id: str = "c", **changes: Any) -> Ranking:
    values = {"label_ids": ("A:1", "A:2", "A:3"), "probabilities": (0.5, 0.3, 0.2), "teacher_digest": "sha256:1"}
    return Ranking(case_id=case_id, **(values | changes))


def digest_rows(kind: TableKind, *sides: list[Row]) -> list[RowDigests]:
    """Comparable tables of the rows of each side."""
    tables: list[RowDigests] = []
    for rows in sides:
        tables.append(RowDigests(kind, like=tables[0] if tables else None))
        for row, split in rows:
            tables[-1].add(row, split)
    return tables


def find_changes(kind: TableKind, before: Record, after: Record) -> set[str]:
    old, new = digest_rows(kind, [(before, "train")], [(after, "train")])
    is_other = old.rows["fields"][0] != new.rows["fields"][0]
    return {name for name, other in zip(FIELDS[kind], is_other, strict=True) if other}


@pytest.mark.parametrize(
    ("kind", "before", "after", "changed"),
    [
        ("cases", make_case(), make_case(), set()),
        ("cases", make_case(), make_case(text="t "), {"text"}),
        ("cases", make_case(image=b"i"), make_case(image=b"i", text=None), {"text"}),
        ("cases", make_case(image=b"i"), make_case(image=b"j"), {"image"}),
        ("cases", make_case(), make_case(image=b"i"), {"image"}),
        ("cases", make_case(), make_case(image=b""), {"image"}),
        ("cases", make_case(), make_case(label_id="A:1"), {"label"}),
        ("cases", make_case(), make_case(group_id="h"), {"patient"}),
        ("cases", make_case(), make_case(attributes={"sex": "f"}), {"attributes"}),
        ("cases", make_case(attributes={"a": "1", "b": "2"}), make_case(attributes={"b": "2", "a": "1"}), set()),
        ("cases", make_case(), make_case(findings=(Finding(id="HP:1", label="x"),)), {"findings"}),
        ("cases", make_case(), make_case(synthetic=False), {"origin"}),
        ("cases", make_case(source="a"), make_case(source="b"), {"origin"}),
        ("rankings", make_ranking(), make_ranking(teacher_digest="sha256:2"), {"teacher"}),
        ("rankings", make_ranking(), make_ranking(probabilities=(0.5, 0.3, 0.1)), {"probabilities"}),
        ("rankings", make_ranking(), make_ranking(label_ids=("A:1", "A:3", "A:2")), {"order of labels"}),
        ("preferences", make_pair(), make_pair(chosen="yes."), {"chosen"}),
        ("preferences", make_pair(), make_pair(chosen_label_ids=("A:3",)), {"chosen"}),
        ("preferences", make_pair(), make_pair(rejected="nope"), {"rejected"}),
        ("preferences", make_pair(), make_pair(policy="top2"), {"policy"}),
        ("preferences", make_pair(), make_pair(template_digest="sha256:3"), {"prompt template"}),
        ("preferences", make_pair(images=(b"ab",)), make_pair(images=(b"a", b"b")), {"image"}),
        ("preferences", make_pair(), make_pair(prompt=(Turn(role="system", content="p"),)), {"prompt"}),
        (
            "preferences",
            make_pair(prompt=(Turn(role="user", content="ab"), Turn(role="user", content="c"))),
            make_pair(prompt=(Turn(role="user", content="a"), Turn(role="user", content="bc"))),
            {"prompt"},
        ),
    ],
)
def test_row_digests_changed_field_is_named(kind: TableKind, before: Record, after: Record, changed: set[str]):
    assert find_changes(kind, before, after) == changed


def test_row_digests_hold_no_content():
    text, image = "a rare finding in a small town", b"\x89PNG" + bytes(range(64))
    (table,) = digest_rows("cases", [(make_case("case-7", text=text, image=image, attributes={"site": "x"}), "test")])
    held = bytes(table._rows) + bytes(table._ids)
    assert table.case_ids([0]) == ("case-7",)
    assert not any(part in held for part in (b"rare", b"town", image[4:12], b"site"))
    assert table.num_bytes == len(held) < 100


def test_row_digests_of_two_comparisons_have_other_hashes():
    (one,), (other,) = (digest_rows("cases", [(make_case(), "train")]) for _ in range(2))
    assert one.rows["case"][0] != other.rows["case"][0]


SPLIT = st.sampled_from(SPLITS)
CASES = st.lists(
    st.tuples(
        st.builds(
            make_case, st.sampled_from("abcdef"), text=st.sampled_from("xy"), label_id=st.sampled_from(["1", None])
        ),
        SPLIT,
    ),
    max_size=12,
    unique_by=lambda row: row[0].case_id,
)
PAIRS = st.lists(
    st.tuples(
        st.builds(
            make_pair,
            st.sampled_from("abc"),
            rejected=st.sampled_from(["n1", "n2", "n3"]),
            policy=st.sampled_from("pq"),
        ),
        SPLIT,
    ),
    max_size=14,
)


@given(before=CASES, after=CASES)
@settings(max_examples=150, deadline=None)
def test_match_rows_of_cases_pairs_each_case_id_once(before: list[Row], after: list[Row]):
    old, new = digest_rows("cases", before, after)
    found = {(int(i), int(j)) for i, j in zip(*match_rows(old, new, "cases"), strict=True)}
    numbered = itertools.product(enumerate(before), enumerate(after))
    assert found == {(i, j) for (i, one), (j, two) in numbered if one[0].case_id == two[0].case_id}


@given(before=PAIRS, after=PAIRS)
@settings(max_examples=150, deadline=None)
def test_match_rows_of_pairs_leaves_the_fewest_differences(before: list[Row], after: list[Row]):
    """A reference by counting: what is equal is matched first, then the same sides, then whatever is left of a case."""
    old, new = digest_rows("preferences", before, after)
    places_before, places_after = match_rows(old, new, "preferences")
    assert len(set(places_before)) == len(set(places_after)) == len(places_before)
    matched = [(before[i], after[j]) for i, j in zip(places_before, places_after, strict=True)]
    assert all(one[0].case_id == two[0].case_id for one, two in matched)

    def count(rows: list[Row], key: Any) -> Counter[Any]:
        return Counter(key(row) for row in rows)

    for key in (lambda row: row, lambda row: row[0].case_id):
        in_both = (count(before, key) & count(after, key)).total()
        assert sum(key(one) == key(two) for one, two in matched) == in_both
    rest = [[*side] for side in (before, after)]
    for row in (count(before, lambda row: row) & count(after, lambda row: row)).elements():
        for side in rest:
            side.remove(row)
    sides = [count(side, lambda row: (row[0].case_id, row[0].rejected)) for side in rest]
    same_sides = sum(one != two and one[0].rejected == two[0].rejected for one, two in matched)
    assert same_sides >= (sides[0] & sides[1]).total()


def test_match_rows_of_empty_tables_matches_nothing():
    old, new = digest_rows("cases", [], [(make_case(), "train")])
    assert [len(places) for places in match_rows(old, new, "cases")] == [0, 0]
    assert count_figures("cases", [old])["train"].num_rows == 0
    assert describe_lengths("cases", [old]) == {"text": None}


def test_count_figures_counts_patients_labels_and_images():
    rows: list[Row] = [
        (make_case("1", group_id="g1", label_id="A"), "train"),
        (make_case("2", group_id="g1", label_id="B", image=b"i"), "train"),
        (make_case("3", group_id="g2", synthetic=False), "train"),
        (make_case("4", group_id="g3", label_id="B"), "test"),
    ]
    (table,) = digest_rows("cases", rows)
    assert count_figures("cases", [table])["train"] == Figures(
        num_rows=3, num_patients=2, num_labelled=2, num_with_image=1, num_synthetic=2, classes={"A": 1, "B": 1}
    )
    assert count_figures("cases", [table])["test"].classes == {"B": 1}


def average_overlap(one: list[int], two: list[int], depth: int) -> float:
    """The definition, depth by depth."""
    shares = [len(set(one[:d]) & set(two[:d])) / d for d in range(1, depth + 1)]
    return math.fsum(shares) / depth


@given(st.integers(1, 14), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_measure_overlap_equals_its_definition(num_labels: int, random: Any):
    rankings = [random.sample(range(num_labels), num_labels)[:10] for _ in range(10)]
    rows = np.array([ranking + [-1] * (10 - len(ranking)) for ranking in rankings], dtype=np.int32)
    before, after = rows[:5], rows[5:]
    depth = min(10, num_labels)
    wanted = [average_overlap(one, two, depth) for one, two in zip(rankings[:5], rankings[5:], strict=True)]
    # Sums of at most 50 shares in another order: rounding errors below 50 * 2**-53.
    assert measure_overlap(before, after) == pytest.approx(math.fsum(wanted) / 5, abs=1e-14)
    assert measure_overlap(before, before) == pytest.approx(1.0, abs=1e-14)


def test_measure_shift_is_half_the_difference_of_shares():
    assert measure_shift({"a": 1, "b": 3}, {"a": 2, "b": 6}) == 0.0
    assert measure_shift({"a": 1, "b": 1}, {"a": 3, "b": 1}) == pytest.approx(0.25)
    assert measure_shift({"a": 5}, {"b": 7}) == 1.0
    assert measure_shift({"a": 5}, {}) is None


def test_shift_p_value_equals_scipys_test_of_the_table():
    from scipy import stats

    table = np.array([[120, 80, 40], [30, 35, 15]])
    before, fresh = (dict(zip("abc", map(int, row), strict=True)) for row in table)
    wanted = stats.chi2_contingency(table, correction=False).pvalue
    assert compute_shift_p_value(before, fresh) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("before", "fresh"),
    [
        ({"a": 500, "b": 500}, {}),
        ({"a": 500, "b": 500}, {"a": 3, "b": 4}),
        ({"a": 500}, {"a": 50}),
        ({"a": 1000, "b": 1000, "c": 3}, {"a": 100, "b": 100}),
    ],
)
def test_shift_p_value_of_tiny_counts_is_not_given(before: dict[str, int], fresh: dict[str, int]):
    assert compute_shift_p_value(before, fresh) is None


def test_shift_p_value_is_uniform_where_nothing_shifted():
    """Half of 400 draws are below 0.5: 200 +- 10 (binomial); 5 of those are allowed."""
    rng = np.random.default_rng(1)
    shares = [0.5, 0.3, 0.2]
    values = []
    for _ in range(400):
        counts = [dict(zip("abc", map(int, rng.multinomial(size, shares)), strict=True)) for size in (900, 150)]
        values.append(compute_shift_p_value(*counts))
    assert all(value is not None for value in values)
    assert 150 < sum(value < 0.5 for value in values if value is not None) < 250


def test_statements_that_leave_other_rows_unread_do_not_agree():
    stated = Figures(num_rows=10, classes={"a": 6, "b": 4})
    more = Figures(num_rows=12, classes={"a": 7, "b": 5})
    new = Figures(num_rows=2, classes={"a": 1, "b": 1})
    none = Figures(num_rows=0, classes={})
    assert agree_on_unread(stated, none, more, new)
    assert not agree_on_unread(stated, none, more, none)
    assert not agree_on_unread(stated, none, more, Figures(num_rows=2, classes={"a": 2}))
    assert not agree_on_unread(none, new, none, new)
