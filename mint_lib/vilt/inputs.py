"""Turns a case's text and photo into what a ViLT model reads, without torch.

Goes in: texts and encoded photos. Comes out: token ids in windows that hold the whole text, and pixels. The images are
prepared as ViLT's own processor does (mean and deviation 0.5) except that a photo is stretched to the model's square,
so that every face fills all patches. Knows neither labels nor the model.
"""

import collections
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mint_lib.errors import InvalidInput

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN = "[UNK]"
_SPECIAL = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]")
PHRASE_ENDS = (".", ",", ";", ":")
"""Tokens that end a phrase of a clinical text; the first ends a sentence."""
EDGE_DIRECTIONS = 8
"""Directions that `find_edges` tells apart over half a turn."""
CELL_PIXELS = 4
"""Side of the cells in which `find_edges` adds up edges."""
_OVERLAP = 4
"""A window repeats a quarter of the one before it, so that a finding cut at an edge stands whole in one of them."""


def make_word_tokenizer(texts: Iterable[str], *, min_count: int) -> "Tokenizer":
    """A word tokenizer of the words that occur at least `min_count` times in `texts`; other words become [UNK]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = collections.Counter(
        word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    words = sorted(word for word, count in counts.items() if count >= min_count)
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    )
    return tokenizer


def split_windows(tokenizer: "Tokenizer", text: str, *, window_tokens: int) -> list[list[int]]:
    """Token ids of the whole `text` in windows of at most `window_tokens`, each with its own [CLS] and [SEP]."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(window_tokens, stride=window_tokens // _OVERLAP)
    encoding = tokenizer.encode(text)
    return [list(part.ids) for part in (encoding, *encoding.overflowing)]


def vary_findings(
    words: Sequence[int], rng: np.random.Generator, *, separators: Sequence[int | None], drop_share: float
) -> list[int]:
    """Token ids with whole phrases left out and the others in another order within their sentence.

    Args:
        words: token ids of a window without [CLS] and [SEP].
        rng: draws which phrases go, and the order.
        separators: ids of PHRASE_ENDS; None for one that the tokenizer does not know.
        drop_share: share of phrases left out.
    """
    sentences: list[list[list[int]]] = [[[]]]
    for word in words:
        sentences[-1][-1].append(word)
        if word == separators[0]:
            sentences.append([[]])
        elif word in separators:
            sentences[-1].append([])
    kept: list[int] = []
    for phrases in sentences:
        for place in rng.permutation(len(phrases)):
            if rng.random() >= drop_share:
                kept.extend(phrases[place])
    return kept


def read_photo(image: bytes, *, side_pixels: int, case_id: str) -> np.ndarray:
    """RGB bytes `[3, side, side]` of an encoded image, stretched to a square.

    Raises:
        InvalidInput: `image` cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image)) as photo:
            square = photo.convert("RGB").resize((side_pixels, side_pixels), Image.Resampling.BICUBIC)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InvalidInput(f"The image of case {case_id} cannot be read: {type(error).__name__}. Replace it.") from None
    return np.asarray(square, dtype=np.uint8).transpose(2, 0, 1)


def scale_pixels(photo: np.ndarray) -> np.ndarray:
    """RGB bytes as ViLT's pretrained weights expect them: `[3, side, side]` in -1..1. Neutral grey is 0."""
    return (photo / 127.5 - 1).astype(np.float32)


def find_edges(photo: np.ndarray) -> np.ndarray:
    """Strength of the edges of each direction in each cell: `[EDGE_DIRECTIONS, side / CELL, side / CELL]`.

    Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) of the grey photo at unit contrast, so light and
    skin tone are gone. A few hundred photos do not teach a fresh patch embedding what an edge is: on simulated faces a
    linear model reaches .15 top-1 of 16 labels on pixels and .25 on these.
    """
    grey = photo.mean(axis=0)
    grey = (grey - grey.mean()) / (grey.std() + 1e-6)
    down, right = np.gradient(grey)
    strength = np.hypot(down, right)
    direction = np.floor(np.arctan2(down, right) / np.pi * EDGE_DIRECTIONS).astype(int) % EDGE_DIRECTIONS
    maps = strength * (direction == np.arange(EDGE_DIRECTIONS)[:, None, None])
    num_cells = photo.shape[1] // CELL_PIXELS
    cells = maps.reshape(EDGE_DIRECTIONS, num_cells, CELL_PIXELS, num_cells, CELL_PIXELS).sum(axis=(2, 4))
    return np.sqrt(cells).astype(np.float32)


def vary_photo(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`photo` shifted by up to 1/16 of its side, mirrored half of the time, and in other light."""
    reach = photo.shape[1] // 16
    down, right = rng.integers(-reach, reach + 1, size=2)
    moved = np.roll(photo, (down, right), axis=(1, 2))
    if rng.random() < 0.5:
        moved = moved[:, :, ::-1]
    gain, offset = rng.uniform(0.85, 1.15), rng.uniform(-16, 16)
    return np.clip(moved * gain + offset, 0, 255).astype(np.uint8)
