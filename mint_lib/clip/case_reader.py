"""Reads cases and labels for a dual encoder: windows of token ids, image arrays, and what is said of a label.

Goes in: cases, labels, a tokenizer and an encoder. Comes out: readings and prompts. It scores nothing. It loads without
torch.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from mint_lib.clip.case_views import Reading
from mint_lib.errors import InvalidInput
from mint_lib.records import Case, Label
from mint_lib.vilt.inputs import PHRASE_ENDS, UNKNOWN, read_photo, split_windows, vary_findings, vary_photo
from mint_lib.vision.tile_variation import vary_tile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mint_lib.clip.dual_encoder import DualEncoder

PLACE = "{label}"
"""Stands in a prompt for the label's name."""


class CaseReader(NamedTuple):
    """What a dual encoder may see, and how."""

    tokenizer: "Tokenizer"
    encoder: "DualEncoder"
    prompts: tuple[str, ...]
    reads_images: bool
    variation: Literal["tissue", "photo"]
    num_variations: int
    """Forms of a training image, the first being the image itself."""
    drop_phrase_share: float
    """Share of a training text's phrases left out."""

    def read(self, cases: Iterable[Case], rng: np.random.Generator | None = None) -> list[Reading]:
        """The readings of `cases`, with variations of their images where `rng` is given to draw them."""
        vary = vary_tile if self.variation == "tissue" else vary_photo
        readings = []
        for case in cases:
            images = None
            if case.image and self.reads_images:
                image = read_photo(case.image, side_pixels=self.encoder.image_size, case_id=case.case_id)
                varied = [vary(image, rng) for _ in range(self.num_variations - 1)] if rng is not None else []
                images = self.encoder.read_images([image, *varied])
            readings.append(Reading(self.split(case.text) if case.text else [], images))
        return readings

    def split(self, text: str) -> list[list[int]]:
        """Windows that hold the whole of `text`."""
        return split_windows(self.tokenizer, text, window_tokens=self.encoder.max_text_tokens)

    def vary_window(self, window: Sequence[int], rng: np.random.Generator) -> list[int]:
        """`window` with phrases left out and the others in another order, or as it is where none are to be dropped."""
        if not self.drop_phrase_share:
            return list(window)
        first, *words, last = window
        marks = [self.tokenizer.encode(mark, add_special_tokens=False).ids for mark in PHRASE_ENDS]
        separators = [ids[0] if len(ids) == 1 and ids[0] != self._unknown_id else None for ids in marks]
        return [first, *vary_findings(words, rng, separators=separators, drop_share=self.drop_phrase_share), last]

    def say(self, label: Label) -> list[list[list[int]]]:
        """Every prompt about `label` in windows, of all its names with a word that the tokenizer knows.

        Raises:
            InvalidInput: there is no such name.
        """
        names = [name for name in dict.fromkeys((label.name, *label.synonyms)) if self._knows(name)]
        if not names:
            raise InvalidInput(
                f"The text tower knows no word of label {label.id}. Give the label a synonym in words of the training "
                "texts, or train with it."
            )
        return [self.split(prompt) for prompt in fill_prompts(self.prompts, names)]

    def _knows(self, name: str) -> bool:
        return any(token != self._unknown_id for token in self.tokenizer.encode(name, add_special_tokens=False).ids)

    @property
    def _unknown_id(self) -> int | None:
        """Id of the word tokenizer's unknown word; a tokenizer of bytes has none."""
        token_id: int | None = self.tokenizer.token_to_id(UNKNOWN)
        return token_id


def fill_prompts(prompts: Sequence[str], names: Sequence[str]) -> list[str]:
    """`prompts` about each of `names`."""
    return [prompt.replace(PLACE, name) for name in names for prompt in prompts]
