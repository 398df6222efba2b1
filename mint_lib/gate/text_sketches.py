"""Near-identical texts: MinHash signatures, the pairs of rows that share a band of them, and the true similarity.

Goes in: texts. Comes out: signatures of 128 32-bit slots, and candidate pairs. 16 bands of 8 slots find a pair of
Jaccard similarity 0.8 with probability 0.95, of 0.9 with 0.9999, and of 0.5 with 0.06 (Leskovec et al., Mining of
Massive Datasets, section 3.4). Knows nothing of splits.
"""

from collections.abc import Sequence

import numpy as np

NUM_SLOTS = 128
_NUM_BANDS = 16
_SHINGLE_CHARACTERS = 5
_NEIGHBOURS = 16
"""Rows of one bucket that a row is compared with; larger buckets stay linear in time."""
_SEED = 1


def list_shingles(text: str) -> set[str]:
    """The 5-character substrings of a text, without regard to case and spacing."""
    words = " ".join(text.casefold().split()).encode(errors="replace").decode()
    return {words[start : start + _SHINGLE_CHARACTERS] for start in range(max(1, len(words) - _SHINGLE_CHARACTERS + 1))}


def sign_texts(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures `[texts, 128]`."""
    from rensa import RMinHash  # type: ignore[import-untyped]

    if not texts:
        return np.zeros((0, NUM_SLOTS), np.uint32)
    shingles = [list(list_shingles(text)) for text in texts]
    return np.array(RMinHash.digests_from_token_sets(shingles, NUM_SLOTS, _SEED), dtype=np.uint32)


def measure_jaccard(first: str, second: str) -> float:
    """Share of common shingles."""
    one, other = list_shingles(first), list_shingles(second)
    return len(one & other) / len(one | other)


def find_text_candidates(signatures: np.ndarray, least: float) -> np.ndarray:
    """Pairs of rows `[pairs, 2]` that share a band and whose estimated similarity is `least` or more."""
    if len(signatures) < 2:
        return np.zeros((0, 2), np.int64)
    width = NUM_SLOTS // _NUM_BANDS
    weights = np.random.default_rng(_SEED).integers(1, 2**63, size=width, dtype=np.uint64) | np.uint64(1)
    keys = [
        (signatures[:, start : start + width].astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
        for start in range(0, NUM_SLOTS, width)
    ]
    pairs = pair_bucket_mates(keys)
    estimates = [
        (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1)
        for part in np.array_split(pairs, max(1, len(pairs) // 100_000))
    ]
    return pairs[np.concatenate(estimates) >= least] if len(pairs) else pairs


def pair_bucket_mates(keys: Sequence[np.ndarray]) -> np.ndarray:
    """Pairs of rows `[pairs, 2]`, the smaller row first, that have the same key in one of the bands.

    In a bucket of many, a row meets the 16 rows after it in an order that differs from band to band.
    """
    found: list[np.ndarray] = []
    rng = np.random.default_rng(_SEED)
    for band in keys:
        shuffled = rng.permutation(len(band))
        order = shuffled[np.argsort(band[shuffled], kind="stable")]
        ranked = band[order]
        for step in range(1, min(_NEIGHBOURS, len(band) - 1) + 1):
            mates = np.nonzero(ranked[step:] == ranked[:-step])[0]
            if not len(mates):
                break
            found.append(np.sort(np.stack([order[mates], order[mates + step]], axis=1), axis=1))
    if not found:
        return np.zeros((0, 2), np.int64)
    return np.unique(np.concatenate(found), axis=0)
