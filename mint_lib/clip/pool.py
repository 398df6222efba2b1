"""How a case's two views become one score.

Goes in: vectors of cases and of labels, and right labels to fit the pool on. Comes out: log-scores. Knows neither
images nor texts, and loads without torch.

Shape suffixes: N cases, L labels, D joint width.
"""

from typing import NamedTuple

import numpy as np

from mint_lib.calibration import fit_temperature, negative_log_likelihood
from mint_lib.clip.case_views import CaseVectors

_WEIGHTS = np.linspace(0.0, 1.0, 21)
"""Shares of the image that are tried; the likelihood is flat at its best."""


class Views(NamedTuple):
    """Log-probabilities of the labels by each view, `image` and `text` [N, L]; and which cases have it, [N]."""

    image: np.ndarray
    text: np.ndarray
    has_image: np.ndarray
    has_text: np.ndarray


class Pool(NamedTuple):
    """A logarithmic opinion pool of the views (Genest and Zidek, Stat. Sci. 1986), tempered.

    Where one view is missing, the other speaks alone, at its own temperature.
    """

    image_weight: float = 0.5
    """Share of the image where a case has both; the text has the rest."""
    image_temperature: float = 1.0
    text_temperature: float = 1.0
    joint_temperature: float = 1.0

    def apply(self, views: Views) -> np.ndarray:
        """Log-scores `[N, L]`; zeros for a case without either view."""
        both_N = views.has_image & views.has_text
        weight_N = np.where(both_N, self.image_weight, views.has_image)
        by_image_NL = weight_N[:, None] * views.image / self.image_temperature
        by_text_NL = ((1 - weight_N) * views.has_text)[:, None] * views.text / self.text_temperature
        scores_NL: np.ndarray = (by_image_NL + by_text_NL) / np.where(both_N, self.joint_temperature, 1.0)[:, None]
        return scores_NL


def compare_with_labels(vectors: CaseVectors, label_LD: np.ndarray, *, scale: float) -> Views:
    """Log-probabilities by each view: a softmax of scaled cosines (Radford et al. 2021, section 3.1.2)."""
    image_NL, text_NL = (_log_softmax(scale * view_ND @ label_LD.T) for view_ND in (vectors.image, vectors.text))
    return Views(image_NL, text_NL, vectors.has_image, vectors.has_text)


def fit_pool(views: Views, truth: np.ndarray) -> Pool:
    """The pool with the best likelihood of `truth`: the temperature of each view first, then what belongs to both."""
    pool, both_N = Pool(), views.has_image & views.has_text
    if views.has_image.any():
        rows = views.has_image
        pool = pool._replace(image_temperature=fit_temperature(views.image[rows], truth[rows]))
    if views.has_text.any():
        rows = views.has_text
        pool = pool._replace(text_temperature=fit_temperature(views.text[rows], truth[rows]))
    tried = []
    for weight in _WEIGHTS if both_N.any() else ():
        scores = pool._replace(image_weight=float(weight)).apply(views)[both_N]
        temperature = fit_temperature(scores, truth[both_N])
        loss = negative_log_likelihood(scores, truth[both_N], temperature=temperature)
        tried.append((loss, pool._replace(image_weight=float(weight), joint_temperature=temperature)))
    return min(tried, key=lambda item: item[0])[1] if tried else pool


def _log_softmax(logits_NL: np.ndarray) -> np.ndarray:
    shifted_NL = logits_NL - logits_NL.max(axis=1, keepdims=True)
    log_probabilities_NL: np.ndarray = shifted_NL - np.log(np.exp(shifted_NL).sum(axis=1, keepdims=True))
    return log_probabilities_NL
