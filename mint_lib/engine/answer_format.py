"""The answers that a student may give when asked for a ranked list: so many different labels in the template's format.

Goes in: a tokenizer, a template and labels. Comes out: an automaton over token ids whose every complete walk is an
answer that `Template.parse` reads back: the header, numbered lines with different labels of the set, the end of turn.
Only the tokenisation that the tokenizer itself gives such an answer is walked, the one the student was trained on. It
knows no model.
"""

import bisect
import collections
import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Self

from mint_lib.engine.label_trie import TokenTrie, count_shared
from mint_lib.errors import InvalidInput
from mint_lib.reading import end_of_turn_id
from mint_lib.student import check_told_apart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mint_lib.records import Label
    from mint_lib.template import Template

_SAMPLE_SEED = 3


@dataclasses.dataclass(frozen=True, slots=True)
class FormatState:
    """How far an answer has come."""

    line: int
    """Lines that are complete."""
    used: frozenset[int]
    """Indices of the labels listed so far."""
    node: int
    """Node of the line's trie; negative: so many tokens of the line's lead are still to come."""


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class _Line:
    """One line of an answer: tokens that every label shares, then the labels."""

    lead: tuple[int, ...]
    trie: TokenTrie


class AnswerFormat:
    """Which token may follow which in an answer. Immutable; all methods may be called from any thread."""

    def __init__(self, lines: Sequence[_Line]):
        self._lines = tuple(lines)
        # A label is listed once, so no answer is longer than its longest labels together.
        longest = sorted((max(sizes) for sizes in zip(*map(_list_sizes, self._lines), strict=True)), reverse=True)
        self.num_answers = len(self._lines)
        """How many labels an answer lists."""
        self.max_tokens = sum(len(line.lead) for line in self._lines) + sum(longest[: self.num_answers])
        """No answer has more tokens, its end-of-turn token included."""

    @classmethod
    def build(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        template: "Template",
        labels: "Sequence[Label]",
        *,
        num_answers: int | None = None,
    ) -> Self:
        """The format of `template` for lists of `num_answers` labels; None: as many as the template asks for.

        Where the set has fewer labels than the template asks for, an answer lists all of them.

        Raises:
            InvalidInput: the set cannot give so many labels, a name does not come back from an answer, or the
                tokenizer does not treat an answer's lines alike whatever stands next to them.
        """
        if num_answers is None:
            num_answers = min(template.num_answers, len(labels))
        if not 1 <= num_answers <= len(labels):
            raise InvalidInput(
                f"An answer cannot list {num_answers} different labels of a set of {len(labels)}. "
                f"Ask for 1 to {len(labels)}."
            )
        _check_names(template, labels)
        pieces = [_cut_lines(tokenizer, template, label, num_answers) for label in labels]
        _check_pieces(tokenizer, template, labels, pieces)
        end_id = end_of_turn_id(tokenizer)
        tries: dict[tuple[tuple[int, ...], ...], TokenTrie] = {}
        lines = []
        for number, column in enumerate(zip(*pieces, strict=True), start=1):
            paths = [(*piece, end_id) for piece in column] if number == num_answers else column
            num_shared = min(count_shared(min(paths), max(paths)), len(paths[0]) - 1)
            bodies = tuple(path[num_shared:] for path in paths)
            # Lines mostly differ by their number only, so two tries serve them all: the last line's and the others'.
            if bodies not in tries:
                check_told_apart(bodies, labels)
                tries[bodies] = TokenTrie.build(bodies)
            lines.append(_Line(paths[0][:num_shared], tries[bodies]))
        return cls(lines)

    def start(self) -> FormatState:
        """The state before the first token."""
        return FormatState(line=0, used=frozenset(), node=-len(self._lines[0].lead))

    def allowed(self, state: FormatState) -> tuple[int, ...]:
        """The token ids that may follow; none where the answer is complete."""
        if state.line == len(self._lines):
            return ()
        line = self._lines[state.line]
        if state.node < 0:
            return (line.lead[state.node],)
        tokens, closed = line.trie.tokens, _closed_nodes(line.trie, state)
        return tuple(tokens[node] for node in line.trie.children[state.node] if node not in closed)

    def advance(self, state: FormatState, token_id: int) -> FormatState:
        """The state after one more token.

        Raises:
            ValueError: `token_id` is not allowed here.
        """
        line = self._lines[state.line] if state.line < len(self._lines) else None
        if line is not None and state.node < 0 and token_id == line.lead[state.node]:
            return dataclasses.replace(state, node=state.node + 1)
        if line is None or state.node < 0:
            raise ValueError(f"token {token_id} is not allowed here")
        trie = line.trie
        below = trie.children[state.node]
        place = bisect.bisect_left(below, token_id, key=trie.tokens.__getitem__)
        if place == len(below) or trie.tokens[below[place]] != token_id or below[place] in _closed_nodes(trie, state):
            raise ValueError(f"token {token_id} is not allowed here")
        node = below[place]
        if trie.children[node]:
            return dataclasses.replace(state, node=node)
        following = self._lines[state.line + 1 : state.line + 2]
        return FormatState(
            line=state.line + 1,
            used=state.used | {trie.sequence_of[node]},
            node=-len(following[0].lead) if following else 0,
        )


def _closed_nodes(trie: TokenTrie, state: FormatState) -> set[int]:
    """Which children of the state's node lead to used labels only. Its time depends on the used labels alone."""
    below = trie.children[state.node]
    first = trie.first_leaves[state.node]
    num_used: collections.Counter[int] = collections.Counter()
    for label in state.used:
        rank = trie.leaf_ranks[label]
        if first <= rank < first + trie.num_leaves[state.node]:
            num_used[below[bisect.bisect_right(below, rank, key=trie.first_leaves.__getitem__) - 1]] += 1
    return {node for node, count in num_used.items() if count == trie.num_leaves[node]}


def _list_sizes(line: _Line) -> Iterator[int]:
    """How many tokens each label takes on `line`, without the lead."""
    depths = [0] * len(line.trie.tokens)
    for node, parent in enumerate(line.trie.parents[1:], start=1):
        depths[node] = depths[parent] + 1
    return (depths[leaf] for leaf in line.trie.leaves)


def _check_names(template: "Template", labels: "Sequence[Label]") -> None:
    """Check that every name can be read from an answer that lists it."""
    for label in labels:
        if template.parse(template.answer([label.name])) != [label.name]:
            raise InvalidInput(f"The name of {label.id} cannot be read back from an answer. Rename the label.")


def _cut_lines(
    tokenizer: "PreTrainedTokenizerBase", template: "Template", label: "Label", num_answers: int
) -> list[tuple[int, ...]]:
    """The tokens of each line of the answer that lists `label` on all of them; the first holds the header too.

    A line ends behind its line break, because a tokenizer may join a closing quote with it.

    Raises:
        InvalidInput: a token belongs to two lines or is a special one.
    """
    text = template.answer([label.name] * num_answers)
    breaks = [place for place, letter in enumerate(text) if letter == "\n"]
    ends = [*(place + 1 for place in breaks[1:]), len(text)]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    lines: list[list[int]] = [[] for _ in ends]
    line = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while start >= ends[line] and line + 1 < len(ends):
            line += 1
        if end > ends[line]:
            raise InvalidInput(
                f"The student's tokenizer joins the end of a line with the next in an answer that lists {label.id}. "
                "Its lists cannot be held to their format: choose a student whose tokenizer splits at line breaks."
            )
        lines[line].append(token)
    return [tuple(tokens) for tokens in lines]


def _check_pieces(
    tokenizer: "PreTrainedTokenizerBase",
    template: "Template",
    labels: "Sequence[Label]",
    pieces: Sequence[Sequence[tuple[int, ...]]],
) -> None:
    """Check that lines cut from different answers make the very answer, with every label among others once.

    Raises:
        InvalidInput: they do not, or a name is not given back by its own tokens.
    """
    special = set(tokenizer.all_special_ids)
    order = list(range(len(labels)))
    random.Random(_SAMPLE_SEED).shuffle(order)
    num_answers = len(pieces[0])
    for start in range(0, len(order), num_answers):
        chosen = [order[(start + step) % len(order)] for step in range(num_answers)]
        ids = [token for line, index in enumerate(chosen) for token in pieces[index][line]]
        text = template.answer([labels[index].name for index in chosen])
        if special.intersection(ids) or tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise InvalidInput(
                "The student's tokenizer does not give back the names of "
                f"{', '.join(labels[index].id for index in chosen)}: one of them holds a special token or characters "
                "that it changes. Rename the label."
            )
        if tokenizer.encode(text, add_special_tokens=False) != ids:
            raise InvalidInput(
                "The student's tokenizer splits a line differently depending on the lines next to it in an answer that "
                f"lists {', '.join(labels[index].id for index in chosen)}. Its ranked lists cannot be held to their "
                "format: rename the label, or choose a student whose tokenizer splits at line breaks."
            )
