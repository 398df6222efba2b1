"""What a case's content says about its label: naive Bayes over words, or colours and texture, out of fold.

Goes in: texts or images with labels and patients. Comes out: `Evidence`, log-scores of every label for every case from
a model that never saw the case's patient, scaled so that they are calibrated, and the share of labels that look random.
Words are counted once a case and their weights add up, so that the evidence without a phrase is a subtraction. Judges
nothing.

Shapes: N cases, M some of them, K labels, V words, F folds.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_FOLDS = 5
_SMOOTHING = 0.3
"""Added to every count. Of 0.1, 0.3 and 1 the best out of fold on simulated notes."""
_MAX_WORDS = 512
"""Words of a note that are looked at."""
_WORD = re.compile(r"\w+")
_FIT_CASES = 5000
_CHI2_90 = 2.7055
"""0.9 quantile of chi-square with 1 degree of freedom: one-sided 95 % from a likelihood ratio."""
_IMAGE_SIDE = 128


@dataclass(frozen=True)
class Words:
    """The words of all cases as numbers, one case after the other."""

    tokens: np.ndarray
    starts: np.ndarray
    """`[N + 1]`: the words of case i are `tokens[starts[i]:starts[i + 1]]`."""
    num_words: int

    def of(self, case: int) -> np.ndarray:
        """The words of one case in their order."""
        return self.tokens[self.starts[case] : self.starts[case + 1]]


@dataclass(frozen=True)
class Evidence:
    """Calibrated scores, and how the model takes a word."""

    scores: np.ndarray
    """`[N, K]`: log-probabilities up to a constant, before scaling."""
    scale: float
    """Factor that calibrates the scores."""
    random_share: float
    """Share of labels that are best explained as drawn at random, by maximum likelihood."""
    random_share_low: float
    """Lower end of its one-sided 95 % interval."""
    folds: np.ndarray
    """`[N]`: the fold that holds a case out."""
    weights: np.ndarray | None
    """`[F, V, K]`: log-likelihood of a word under each label, fold by fold; None for images."""

    def contradicts(self, scores_MK: np.ndarray, label_M: np.ndarray, odds: float) -> np.ndarray:
        """Which cases' scores speak against their label at `odds` to one or more, another label being more likely."""
        own = scores_MK[np.arange(len(label_M)), label_M]
        return np.asarray(self.scale * (scores_MK.max(axis=1) - own) >= np.log(odds))


def split_words(texts: Sequence[str]) -> Words:
    """Texts as word numbers, without regard to capitals; the texts themselves are not kept."""
    numbers: dict[str, int] = {}
    rows = [
        np.array([numbers.setdefault(word, len(numbers)) for word in _WORD.findall(text.casefold())[:_MAX_WORDS]], int)
        for text in texts
    ]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    tokens = np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)
    return Words(tokens, starts, len(numbers))


def weigh_words(words: Words, label_N: np.ndarray, group_N: np.ndarray, num_labels: int) -> Evidence:
    """The evidence of the words: multinomial naive Bayes on their presence."""
    from scipy.sparse import csr_matrix
    from sklearn.naive_bayes import MultinomialNB

    # A copy: joining a row's repeated words sorts the words in place.
    presence = csr_matrix(
        (np.ones(len(words.tokens), np.float32), words.tokens, words.starts),
        shape=(len(label_N), words.num_words),
        copy=True,
    )
    presence.sum_duplicates()
    presence.data[:] = 1
    fold_N = assign_folds(group_N)
    scores_NK = np.zeros((len(label_N), num_labels))
    weights_FVK = np.zeros((NUM_FOLDS, words.num_words, num_labels), np.float32)
    for fold in range(NUM_FOLDS):
        held = fold_N == fold
        model = MultinomialNB(alpha=_SMOOTHING, fit_prior=False)
        model.partial_fit(presence[~held], label_N[~held], classes=np.arange(num_labels))
        weights_FVK[fold] = model.feature_log_prob_.T
        scores_NK[held] = presence[held] @ weights_FVK[fold]
    return _calibrate(scores_NK, label_N, group_N, fold_N, weights_FVK)


def weigh_images(figures_NM: np.ndarray, label_N: np.ndarray, group_N: np.ndarray, num_labels: int) -> Evidence:
    """The evidence of the figures of images: linear discriminants with shrunk covariance."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fold_N = assign_folds(group_N)
    scores_NK = np.full((len(label_N), num_labels), -50.0)
    for fold in range(NUM_FOLDS):
        held = fold_N == fold
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
        model.fit(figures_NM[~held], label_N[~held])
        scores_NK[np.ix_(held, model.classes_)] = np.maximum(model.predict_log_proba(figures_NM[held]), -50)
    return _calibrate(scores_NK, label_N, group_N, fold_N, None)


def describe_image(data: bytes) -> np.ndarray:
    """The figures of an encoded image: its colours and its texture, at a bounded size."""
    from PIL import Image

    from mint_lib.vision.colour_texture import describe_colours, describe_texture

    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((_IMAGE_SIDE, _IMAGE_SIDE), Image.Resampling.BILINEAR)
    pixels_CHW = np.asarray(small).transpose(2, 0, 1)
    return np.concatenate([describe_colours(pixels_CHW), describe_texture(pixels_CHW)])


def assign_folds(group_N: np.ndarray) -> np.ndarray:
    """A fold for every case, the same for all of a patient."""
    numbers = np.unique(group_N, return_inverse=True)[1]
    order = np.random.default_rng(0).permutation(int(numbers.max()) + 1 if len(numbers) else 0)
    return np.asarray(order[numbers] % NUM_FOLDS)


def _calibrate(
    scores_NK: np.ndarray,
    label_N: np.ndarray,
    group_N: np.ndarray,
    fold_N: np.ndarray,
    weights_FVK: np.ndarray | None,
) -> Evidence:
    """Fit scale s and random share e of p(label) = (1 - e) softmax(s * scores) + e / K, by maximum likelihood.

    The second term keeps flipped labels from flattening the scores of all others. The cases of a patient share one
    vote, as they are not independent.
    """
    from scipy.optimize import brentq, minimize_scalar

    picked = np.random.default_rng(0).permutation(len(label_N))[:_FIT_CASES]
    scores, label = scores_NK[picked] - scores_NK[picked].max(axis=1, keepdims=True), label_N[picked]
    num_labels = scores.shape[1]
    _, patient, num_cases = np.unique(group_N[picked], return_inverse=True, return_counts=True)
    votes = 1 / num_cases[patient]

    def lose(log_scale: float, share: float) -> float:
        scaled = np.exp(log_scale) * scores
        own = np.exp(scaled[np.arange(len(label)), label]) / np.exp(scaled).sum(axis=1)
        return -float(votes @ np.log((1 - share) * own + share / num_labels + 1e-300))

    def fit_scale(share: float) -> tuple[float, float]:
        best = minimize_scalar(lambda value: lose(value, share), bounds=(-4, 2), method="bounded")
        return float(best.fun), float(best.x)

    best = minimize_scalar(
        lambda value: fit_scale(value)[0], bounds=(0, 0.95), method="bounded", options={"xatol": 1e-4}
    )
    share = float(best.x) if best.fun < fit_scale(0.0)[0] else 0.0
    least, log_scale = fit_scale(share)

    def excess(value: float) -> float:
        return 2 * (fit_scale(value)[0] - least) - _CHI2_90

    low = float(brentq(excess, 0, share, xtol=1e-4)) if share and excess(0.0) > 0 else 0.0
    # Random labels fall on the right one once in K times.
    flipped = (num_labels - 1) / num_labels
    return Evidence(scores_NK, float(np.exp(log_scale)), share * flipped, low * flipped, fold_N, weights_FVK)
