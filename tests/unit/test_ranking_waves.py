"""The ranking of a label set, wave by wave, against all labels computed by brute force from a model made of hashes."""

import hashlib
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mint_lib.engine.label_trie import LabelTrie
from mint_lib.engine.ranking import LabelRanking
from mint_lib.engine.requests import EngineLimits
from mint_lib.errors import ComputationFailed

WHOLE = EngineLimits(exact_trie_tokens=10**9)
VOCABULARY = 40


class HashModel:
    """Conditional distributions over a small vocabulary, each drawn from a hash of its prefix."""

    def __init__(self, seed, *, sharpness=2.0):
        self.seed, self.sharpness, self._known = seed, sharpness, {}

    def predict(self, prefix):
        if prefix not in self._known:
            digest = hashlib.sha256(repr((self.seed, prefix)).encode()).digest()
            draw = random.Random(digest)
            logits = [self.sharpness * draw.gauss(0, 1) for _ in range(VOCABULARY)]
            total = math.log(math.fsum(map(math.exp, logits)))
            self._known[prefix] = [logit - total for logit in logits]
        return self._known[prefix]


class FlatModel:
    """Every token is as probable as any other, so everything ties."""

    def predict(self, _prefix):
        return [-math.log(VOCABULARY)] * VOCABULARY


def make_trie(num_labels, *, seed, num_header=3, depth=6, width=6):
    """A trie of random paths; 0 closes each and appears nowhere else, so none begins another."""
    draw = random.Random(seed)
    paths = set()
    while len(paths) < num_labels:
        # The larger share takes few ways, as names of one family do.
        paths.add(tuple(draw.randint(1, width if draw.random() < 0.7 else 39) for _ in range(draw.randint(1, depth))))
    return LabelTrie.from_paths([(*range(1, num_header + 1), *path, 0) for path in sorted(paths)])


def run(trie, model, limits, num_proven=5):
    """Drive one ranking; checks what a wave promises. Returns the outcome and the waves."""
    ranking = LabelRanking(trie, limits, num_proven)
    prefixes, waves = {-1: ()}, []
    while (wave := ranking.next_wave()) is not None:
        first = len(prefixes) - 1
        for place, (token, parent) in enumerate(zip(wave.token_ids, wave.parents, strict=True), start=first):
            assert -1 <= parent < place
            prefixes[place] = (*prefixes[parent], token)
        assert all(source >= first or (source == -1 and not waves) for source in wave.sources)
        assert list(wave.sources) == sorted(wave.sources)
        ranking.take([model.predict(prefixes[source])[t] for source, t in zip(wave.sources, wave.targets, strict=True)])
        waves.append(wave)
    assert len(set(prefixes.values())) == len(prefixes), "a place was computed twice"
    return ranking.result(), waves


def brute_force(trie, model):
    """Log-probability of each label after the header, normalised over the set."""
    scores = []
    for label in range(trie.num_labels):
        path = trie.path(label)
        scores.append(math.fsum(model.predict(path[:k])[path[k]] for k in range(len(trie.header), len(path))))
    total = max(scores) + math.log(math.fsum(math.exp(score - max(scores)) for score in scores))
    return [score - total for score in scores]


def check_bounds(ranked, expected):
    """Everything that `Ranked` says of itself, against the truth."""
    given = ranked.log_probabilities
    reached = [label for label, value in enumerate(given) if value > -math.inf]
    assert math.isclose(math.fsum(math.exp(given[label]) for label in reached), 1.0, abs_tol=1e-9)
    true_unreached = 1.0 - math.fsum(math.exp(expected[label]) for label in reached)
    assert true_unreached <= ranked.unreached_mass + 1e-9
    for label in reached:
        probability, truth = math.exp(given[label]), math.exp(expected[label])
        assert truth - 1e-9 <= probability <= truth + probability * ranked.unreached_mass + 1e-9
    order = sorted(range(len(given)), key=lambda label: -given[label])
    for place in range(ranked.num_proven):
        rest = max((expected[label] for label in order[place + 1 :]), default=-math.inf)
        assert expected[order[place]] >= rest - 1e-9


@pytest.mark.parametrize("num_labels", [1, 2, 12, 300])
@pytest.mark.parametrize("num_header", [0, 3])
def test_ranking_of_a_small_set_equals_brute_force(num_labels, num_header):
    trie, model = make_trie(num_labels, seed=num_labels, num_header=num_header), HashModel(1)
    ranked, _ = run(trie, model, WHOLE)
    assert ranked.log_probabilities == pytest.approx(brute_force(trie, model), abs=1e-9)
    assert (ranked.is_exact, ranked.num_proven, ranked.unreached_mass) == (True, num_labels, 0.0)


def test_ranking_of_a_small_set_is_one_pass_over_each_place_that_predicts():
    trie = make_trie(40, seed=3)
    ranked, waves = run(trie, HashModel(1), EngineLimits())
    inner = sum(1 for below in trie.trie.children[1:] if below)
    assert [len(wave.token_ids) for wave in waves] == [len(trie.header) + inner] == [ranked.num_label_tokens]


def test_ranking_of_a_large_set_scored_whole_comes_in_bounded_waves():
    trie, model = make_trie(2000, seed=4), HashModel(2)
    ranked, waves = run(trie, model, WHOLE)
    assert max(len(wave.token_ids) for wave in waves) <= 512 < ranked.num_label_tokens
    assert ranked.log_probabilities == pytest.approx(brute_force(trie, model), abs=1e-9)


@settings(deadline=None)  # thousands of hashes; slow where others compute too
@given(
    seed=st.integers(0, 10**6),
    num_labels=st.integers(2, 400),
    sharpness=st.sampled_from([0.1, 1.0, 3.0, 8.0]),
    num_proven=st.integers(1, 12),
    budget=st.sampled_from([64, 150, 4096]),
)
def test_search_bounds_hold_and_proven_places_are_right(seed, num_labels, sharpness, num_proven, budget):
    trie, model = make_trie(num_labels, seed=seed), HashModel(seed, sharpness=sharpness)
    limits = EngineLimits(exact_trie_tokens=16, bounded_label_tokens=budget)
    ranked, _ = run(trie, model, limits, num_proven)
    check_bounds(ranked, brute_force(trie, model))
    if ranked.num_label_tokens + trie.depth <= budget:
        assert ranked.num_proven >= min(num_proven, num_labels)
        assert ranked.unreached_mass <= 1e-3 + 1e-9
    assert ranked.num_label_tokens <= max(budget, trie.depth)


def test_search_of_thousands_of_labels_computes_a_small_part_and_proves_it():
    trie, model = make_trie(5000, seed=5, depth=8), HashModel(7, sharpness=4.0)
    ranked, waves = run(trie, model, EngineLimits())
    check_bounds(ranked, brute_force(trie, model))
    assert not ranked.is_exact
    assert ranked.num_proven >= 5
    assert ranked.unreached_mass <= 1e-3
    assert ranked.num_label_tokens < trie.num_tokens / 5
    assert max(len(wave.token_ids) for wave in waves) <= 128


@pytest.mark.parametrize("budget", [64, 200, 4096])
def test_search_names_the_very_share_it_left_where_no_probability_leaves_the_set(budget):
    trie = make_trie(400, seed=9)
    ways = {}
    for label in range(trie.num_labels):
        path = trie.path(label)
        for length in range(len(path)):
            ways.setdefault(path[:length], set()).add(path[length])
    wild = HashModel(11, sharpness=3.0)

    class Inside:
        """The hash model, told that only labels can follow."""

        def predict(self, prefix):
            values = wild.predict(prefix)
            total = math.log(math.fsum(math.exp(values[token]) for token in ways[prefix]))
            return [value - total for value in values]

    limits = EngineLimits(exact_trie_tokens=16, bounded_label_tokens=budget)
    ranked, _ = run(trie, Inside(), limits)
    expected = brute_force(trie, Inside())
    given = ranked.log_probabilities
    left = 1.0 - math.fsum(math.exp(truth) for truth, value in zip(expected, given, strict=True) if value > -math.inf)
    assert ranked.unreached_mass == pytest.approx(left, abs=1e-9)
    assert ranked.unreached_mass > 0
    check_bounds(ranked, expected)


def test_search_with_the_smallest_budget_still_answers():
    trie, model = make_trie(5000, seed=5, depth=8), HashModel(7, sharpness=0.5)
    ranked, _ = run(trie, model, EngineLimits(bounded_label_tokens=64))
    check_bounds(ranked, brute_force(trie, model))
    assert ranked.num_label_tokens <= 64
    assert ranked.unreached_mass > 1e-3


def test_search_follows_one_label_to_its_end_where_the_budget_is_shorter_than_a_label():
    chain = tuple(range(1, 100))
    trie = LabelTrie.from_paths([(*chain, 0), (*chain[:90], 101, 0), (200, 0)])
    model = type("Two", (), {"predict": lambda _self, _prefix: [-1.0] * 201})()
    ranked, _ = run(trie, model, EngineLimits(exact_trie_tokens=16, bounded_label_tokens=64), num_proven=3)
    assert max(ranked.log_probabilities) > -math.inf
    check_bounds(ranked, brute_force(trie, model))


@pytest.mark.parametrize("budget", [64, 4096])
def test_search_where_everything_ties_proves_no_wrong_order(budget):
    trie = make_trie(200, seed=6, depth=3)
    ranked, _ = run(trie, FlatModel(), EngineLimits(exact_trie_tokens=16, bounded_label_tokens=budget))
    check_bounds(ranked, brute_force(trie, FlatModel()))
    assert ranked.num_proven >= (5 if budget == 4096 else 0)


def test_search_that_reaches_every_label_is_exact():
    trie, model = make_trie(30, seed=8), HashModel(3, sharpness=0.1)
    ranked, _ = run(trie, model, EngineLimits(exact_trie_tokens=16), num_proven=30)
    assert (ranked.is_exact, ranked.num_proven, ranked.unreached_mass) == (True, 30, 0.0)
    assert ranked.log_probabilities == pytest.approx(brute_force(trie, model), abs=1e-9)


def test_search_computes_tokens_without_a_choice_in_one_wave():
    # Two labels of twenty tokens that part at once: header, then both chains together.
    trie = LabelTrie.from_paths([(5, first, *range(10, 30), 0) for first in (1, 2)])
    ranked, waves = run(trie, FlatModel(), EngineLimits(exact_trie_tokens=16))
    assert [len(wave.token_ids) for wave in waves] == [1, 42]
    assert ranked.is_exact


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ranking_refuses_numbers_that_are_not_finite(value):
    ranking = LabelRanking(make_trie(3, seed=1), WHOLE, 1)
    wave = ranking.next_wave()
    with pytest.raises(ComputationFailed, match="not finite"):
        ranking.take([value] * len(wave.targets))


def test_ranking_rounding_above_certainty_keeps_the_bound():
    trie = make_trie(50, seed=2)
    model = type("Lifted", (), {"predict": lambda _self, _prefix: [1e-6] * VOCABULARY})()
    ranked, _ = run(trie, model, EngineLimits(exact_trie_tokens=16), num_proven=50)
    assert ranked.log_probabilities == pytest.approx([-math.log(50)] * 50, abs=1e-9)
