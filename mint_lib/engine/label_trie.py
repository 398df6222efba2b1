"""Tries of token sequences, and the one of a closed label set: what the student may answer first, token by token.

Goes in: a tokenizer, a template and labels. Comes out: an immutable tree in flat tuples. A label's path is the tokens
from the answer's start to the end of its first item; what all labels have in common is the header, the rest is the
trie. It knows no probabilities and no model.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from mint_lib.errors import InvalidInput
from mint_lib.student import encode_first_items

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mint_lib.records import Label
    from mint_lib.template import Template


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class TokenTrie:
    """A trie of sequences of which none begins another, so every sequence ends in a leaf and every leaf is one.

    Node 0 is the root and holds no token. Nodes are numbered depth first with siblings by token id, so a parent comes
    before its children, and the leaves below a node are neighbours in `leaves`.
    """

    tokens: tuple[int, ...]
    """The token of each node; -1 for the root."""
    parents: tuple[int, ...]
    children: tuple[tuple[int, ...], ...]
    """The nodes below each node, by token id."""
    sequence_of: tuple[int, ...]
    """The sequence that ends at each node; -1 where none does."""
    leaves: tuple[int, ...]
    """The node at which each sequence ends."""
    leaf_ranks: tuple[int, ...]
    """Place of each sequence in depth-first order."""
    first_leaves: tuple[int, ...]
    """Rank of the first leaf at or below each node."""
    num_leaves: tuple[int, ...]
    """How many sequences pass through each node."""

    @classmethod
    def build(cls, sequences: Sequence[Sequence[int]]) -> Self:
        """The trie of `sequences`, in time linear in their tokens but for one sort.

        Raises:
            ValueError: there is none, one is empty or one begins another.
        """
        order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
        if not order or not sequences[order[0]]:
            raise ValueError("a trie needs sequences, of at least one token each")
        tokens, parents = [-1], [-1]
        children: list[list[int]] = [[]]
        sequence_of, first_leaves, num_leaves = [-1], [0], [len(sequences)]
        leaves, leaf_ranks = [0] * len(sequences), [0] * len(sequences)
        path: list[int] = [0]
        before: Sequence[int] = ()
        for rank, index in enumerate(order):
            sequence = sequences[index]
            num_shared = count_shared(before, sequence)
            if before and num_shared == len(before):
                raise ValueError("no sequence of a trie may begin another")
            del path[num_shared + 1 :]
            for node in path[1:]:
                num_leaves[node] += 1
            for token in sequence[num_shared:]:
                node = len(tokens)
                children[path[-1]].append(node)
                tokens.append(token)
                parents.append(path[-1])
                children.append([])
                sequence_of.append(-1)
                first_leaves.append(rank)
                num_leaves.append(1)
                path.append(node)
            sequence_of[path[-1]], leaves[index], leaf_ranks[index] = index, path[-1], rank
            before = sequence
        return cls(
            tokens=tuple(tokens),
            parents=tuple(parents),
            children=tuple(map(tuple, children)),
            sequence_of=tuple(sequence_of),
            leaves=tuple(leaves),
            leaf_ranks=tuple(leaf_ranks),
            first_leaves=tuple(first_leaves),
            num_leaves=tuple(num_leaves),
        )

    def path(self, node: int) -> tuple[int, ...]:
        """The tokens from below the root to `node`."""
        found = []
        while node:
            found.append(self.tokens[node])
            node = self.parents[node]
        return tuple(reversed(found))


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class LabelTrie:
    """The first items that an answer may have, one for each label, in the labels' order."""

    header: tuple[int, ...]
    """The tokens that every answer begins with; not part of any label's probability."""
    trie: TokenTrie
    """What follows the header. Its sequences are the labels."""
    depth: int
    """Tokens of the longest first item, with the header."""

    @classmethod
    def build(cls, tokenizer: "PreTrainedTokenizerBase", template: "Template", labels: "Sequence[Label]") -> Self:
        """The trie of `labels` as answers of `template` name them first.

        Raises:
            InvalidInput: there is no label, or one label's answer begins another's.
        """
        if not labels:
            raise InvalidInput("A label set needs at least one label. Give the labels that the student was trained on.")
        return cls.from_paths(encode_first_items(tokenizer, template, labels))

    @classmethod
    def from_paths(cls, paths: Sequence[Sequence[int]]) -> Self:
        """The trie of token sequences, one for each label, of which none begins another."""
        # A single label shares all of itself; its last token is kept so that the trie has its leaf.
        num_header = min(count_shared(min(map(tuple, paths)), max(map(tuple, paths))), len(paths[0]) - 1)
        return cls(
            header=tuple(paths[0][:num_header]),
            trie=TokenTrie.build([path[num_header:] for path in paths]),
            depth=max(map(len, paths)),
        )

    @property
    def num_labels(self) -> int:
        """How many labels there are."""
        return len(self.trie.leaves)

    @property
    def num_tokens(self) -> int:
        """How many distinct tokens there are, header and last tokens included."""
        return len(self.header) + len(self.trie.tokens) - 1

    def path(self, label: int) -> tuple[int, ...]:
        """The tokens of the first item that names the label of index `label`."""
        return self.header + self.trie.path(self.trie.leaves[label])


def count_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens both begin with."""
    num_shared = 0
    for token, other in zip(first, second, strict=False):
        if token != other:
            break
        num_shared += 1
    return num_shared
