"""Tokens become text while they are made: whole characters only, and never a stop string.

Goes in: token ids one by one. Comes out: pieces of text that can be sent at once; joined, they are the decoded answer
up to the first stop string. It knows no protocol.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes an answer piece by piece.

    A character may take several tokens, and some tokenizers drop a space in front of the first word. So each piece is
    what decoding adds to the piece before it, and nothing is given out while the text ends in the middle of a
    character.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that is certain with one more token."""
        self._pending.append(token_id)
        text = self._decode()
        return "" if text.endswith(_UNFINISHED) else self._advance(text)

    def finish(self) -> str:
        """The rest, unfinished characters as replacement characters."""
        return self._advance(self._decode())

    def _decode(self) -> str:
        return _decode(self._tokenizer, self._context + self._pending)

    def _advance(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        if piece:
            self._context, self._pending = self._pending, []
            self._context_text = _decode(self._tokenizer, self._context)
        return piece


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)  # a list only for a batch
    return text


class StopStrings:
    """Ends a text before the first of its stop strings, holding back what may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def add(self, piece: str) -> str:
        """What of the text so far can be given out; sets `is_stopped` once a stop string is complete."""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        num_held = self._count_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _count_held(self, text: str) -> int:
        """How many last characters of `text` begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
