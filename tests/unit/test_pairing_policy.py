"""The policy: what one case's ranking prefers to what, without texts, tokens or a store."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny_pairing import IDS, LABELS, SEEING, make_case, make_config, make_ranking

from mint_lib.errors import InvalidInput
from mint_lib.pairing.policy import Preference, check_label_set, draw_preferences
from mint_lib.records import Label


@pytest.mark.parametrize(
    ("policy", "chosen", "rejected"),
    [
        ({"rejected": "bottom"}, IDS[:2], IDS[6:]),
        ({"rejected": "next"}, IDS[:2], IDS[2:4]),
        ({"ground_truth": "first"}, [IDS[5], IDS[0]], IDS[6:]),
        ({"ground_truth": "first", "rejected": "next"}, [IDS[5], IDS[0]], IDS[1:3]),
    ],
)
def test_policy_decides_both_sides(policy, chosen, rejected):
    drawn = draw_preferences(make_case(0, label_id=IDS[5]), make_ranking(0), make_config(**policy))
    assert drawn == [Preference(tuple(chosen), tuple(rejected))]


def test_policy_sampled_draws_are_distinct_and_stay_in_the_pool():
    config = make_config(rejected="sampled", top_k=1, bottom_q=1, sample_from_ranks=4, pairs_per_case=4)
    drawn = draw_preferences(make_case(0), make_ranking(0), config)
    assert {preference.chosen for preference in drawn} == {(IDS[0],)}
    assert {preference.rejected for preference in drawn} == {(label,) for label in IDS[1:5]}


@pytest.mark.parametrize(
    ("label_id", "drawn"), [(None, "no_diagnosis"), (IDS[5], "diagnosis_not_chosen"), (IDS[1], None)]
)
def test_policy_ground_truth_drop_keeps_only_cases_that_the_teacher_has_right(label_id, drawn):
    found = draw_preferences(make_case(0, label_id=label_id), make_ranking(0), make_config(ground_truth="drop"))
    assert found == (drawn or [Preference(tuple(IDS[:2]), tuple(IDS[6:]))])


@pytest.mark.parametrize("ground_truth", ["none", "first"])
def test_policy_unlabelled_case_follows_the_teacher(ground_truth):
    found = draw_preferences(make_case(0), make_ranking(0), make_config(ground_truth=ground_truth))
    assert found == [Preference(tuple(IDS[:2]), tuple(IDS[6:]))]


@pytest.mark.parametrize(("top_k", "bottom_q"), [(5, 4), (1, 8), (10, 15)])
def test_policy_more_names_than_labels_are_refused_with_the_numbers(top_k, bottom_q):
    with pytest.raises(InvalidInput, match=f"{top_k + bottom_q} is larger than the label set of 8"):
        check_label_set(LABELS, make_config(top_k=top_k, bottom_q=bottom_q))


def test_policy_more_draws_than_the_pool_holds_are_refused():
    config = make_config(rejected="sampled", sample_from_ranks=3, pairs_per_case=4)
    with pytest.raises(InvalidInput, match="3 different draws of 2"):
        check_label_set(LABELS, config)


def test_policy_labels_with_one_name_are_refused_before_chosen_can_equal_rejected():
    twins = [*LABELS, Label(id="OMIM:99", name="disease  TYPE 3")]
    with pytest.raises(InvalidInput, match="OMIM:3 and OMIM:99"):
        check_label_set(twins, make_config())


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs_per_case": 2},
        {"sample_from_ranks": 3},
        {"rejected": "sampled", "sample_from_ranks": 1},
        {"control": "shuffled_teacher", "ground_truth": "drop"},
        {"top_k": 0},
        {"unknown": 1},
        {"pairs": "captions"},
        {"pairs": "captions", "student": SEEING, "control": "shuffled_teacher"},
    ],
)
def test_policy_config_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ValidationError):
        make_config(**changes)


@st.composite
def drawn_cases(draw):
    """A case, its ranking, and settings that fit the label set."""
    top_k = draw(st.integers(1, len(IDS) - 1))
    bottom_q = draw(st.integers(1, len(IDS) - top_k))
    changes = {"top_k": top_k, "bottom_q": bottom_q, "seed": draw(st.integers(0, 2**32 - 1))}
    changes["rejected"] = draw(st.sampled_from(["bottom", "next", "sampled"]))
    if changes["rejected"] == "sampled":
        changes["sample_from_ranks"] = draw(st.none() | st.integers(bottom_q, len(IDS)))
        pool = min(changes["sample_from_ranks"] or len(IDS), len(IDS) - top_k)
        changes["pairs_per_case"] = draw(st.integers(1, min(16, math.comb(pool, bottom_q))))
    changes["control"] = draw(st.sampled_from(["none", "ground_truth_only"]))
    changes["ground_truth"] = draw(st.sampled_from(["none", "first", "drop"]))
    order = tuple(draw(st.permutations(IDS)))
    ranking = make_ranking(0).model_copy(update={"label_ids": order})
    case = make_case(draw(st.integers(0, 99)), label_id=draw(st.none() | st.sampled_from(IDS)))
    return case, ranking, make_config(**changes)


@given(drawn_cases())
def test_policy_sides_have_their_sizes_and_share_no_label(drawn):
    case, ranking, config = drawn
    check_label_set(LABELS, config)
    found = draw_preferences(case, ranking, config)
    if isinstance(found, str):
        assert found in ("no_diagnosis", "diagnosis_not_chosen")
        return
    assert len(set(found)) == len(found) == config.pairs_per_case
    for chosen, rejected in found:
        assert (len(set(chosen)), len(set(rejected))) == (config.top_k, config.bottom_q)
        assert set(chosen) | set(rejected) <= set(IDS)
        assert not set(chosen) & set(rejected)


@given(drawn_cases())
def test_policy_without_truth_names_both_sides_in_the_order_of_the_ranking(drawn):
    case, ranking, config = drawn
    config = config.model_copy(update={"control": "none", "ground_truth": "none"})
    for chosen, rejected in draw_preferences(case, ranking, config):
        assert chosen == ranking.label_ids[: config.top_k]
        places = [ranking.label_ids.index(label) for label in rejected]
        assert places == sorted(places)
        assert places[0] >= config.top_k
        if config.rejected == "sampled":
            assert places[-1] < config.top_k + (config.sample_from_ranks or len(IDS))


@given(drawn_cases())
def test_policy_draws_by_the_seed_and_the_case_s_id_alone(drawn):
    case, ranking, config = drawn
    found = draw_preferences(case, ranking, config)
    alike = case.model_copy(update={"text": "Another text.", "image": None, "findings": (), "group_id": "another"})
    assert draw_preferences(alike, ranking.model_copy(update={"case_id": "another"}), config) == found


@given(drawn_cases(), st.permutations(IDS))
def test_policy_ground_truth_only_looks_at_no_ranking(drawn, order):
    case, ranking, config = drawn
    config = config.model_copy(update={"control": "ground_truth_only"})
    found = draw_preferences(case, ranking, config)
    assert draw_preferences(case, ranking.model_copy(update={"label_ids": tuple(order)}), config) == found
    assert found == "no_diagnosis" if case.label_id is None else {pair.chosen[0] for pair in found} == {case.label_id}


@pytest.mark.parametrize(
    ("control", "drawn"),
    [
        ("none", [("34", "70"), ("34", "12"), ("34", "01")]),
        ("ground_truth_only", [("52", "47"), ("52", "67"), ("52", "41")]),
    ],
)
def test_policy_draws_of_a_seed_stay_what_versions_hold(control, drawn):
    # A version that is made again must have the digest that it had.
    config = make_config(rejected="sampled", pairs_per_case=3, control=control)
    found = draw_preferences(make_case(3, label_id=IDS[5]), make_ranking(3, first=3), config)
    assert [tuple("".join(label[-1] for label in side) for side in pair) for pair in found] == drawn
