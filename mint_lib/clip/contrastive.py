"""Contrastive learning with several positives, and retrieval.

Goes in: a dual encoder and a batch, or unit vectors and which of them belong together. Comes out: a loss, and recall
at k. Knows neither cases nor labels by name. It imports torch at its top, so import it where it is needed.

Shape suffixes: A and B items on either side, L labels, D joint width, N cases.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mint_lib.clip.case_views import CaseVectors, Reading
from mint_lib.clip.dual_encoder import DualEncoder


class Batch(NamedTuple):
    """Cases of a step, in one order; `image_rows` and `text_rows` say which of them have an image, or a text."""

    image_rows: Sequence[int]
    images: Sequence[np.ndarray]
    """As the encoder's `read_images` makes them, one for each of `image_rows`."""
    text_rows: Sequence[int]
    windows: Sequence[Sequence[int]]
    """Token ids, one window for each of `text_rows`."""
    text_keys: Sequence[int]
    """Equal for equal texts, one for each of `text_rows`."""
    targets: Sequence[int]
    """Label of each case."""
    prompts: Sequence[Sequence[int]]
    """Token ids of a prompt for each label."""


def draw_batches(
    readings: Sequence[Reading],
    targets: Sequence[int],
    text_keys: Sequence[int],
    prompts: Sequence[Sequence[Sequence[int]]],
    rng: np.random.Generator,
    *,
    vary: Callable[[Sequence[int], np.random.Generator], Sequence[int]],
    batch_size: int,
) -> Iterator[Batch]:
    """Batches of one pass, in random order: one variation of an image, one window of a text, one prompt of a label.

    Args:
        readings: the training cases.
        targets: label of each case.
        text_keys: equal for equal texts.
        prompts: token ids of each label's prompts.
        rng: draws.
        vary: changes a window.
        batch_size: most cases of a batch.
    """
    order = rng.permutation(len(readings))
    for start in range(0, len(order), batch_size):
        rows = [int(row) for row in order[start : start + batch_size]]
        images = {place: item for place, row in enumerate(rows) if (item := readings[row].images) is not None}
        texts = {place: readings[row].windows for place, row in enumerate(rows) if readings[row].windows}
        yield Batch(
            image_rows=list(images),
            images=[item[rng.integers(len(item))] for item in images.values()],
            text_rows=list(texts),
            windows=[vary(item[int(rng.integers(len(item)))], rng) for item in texts.values()],
            text_keys=[text_keys[rows[place]] for place in texts],
            targets=[targets[row] for row in rows],
            prompts=[said[int(rng.integers(len(said)))] for said in prompts],
        )


def compute_loss(encoder: DualEncoder, batch: Batch) -> torch.Tensor:
    """Mean over image and label, text and label, and image and text, as far as the batch has them.

    A label's prompt is the answer of every case of the label. A text is the answer of its own case's image, and of
    every image with the same text.
    """
    scale, targets_N = encoder.scale(), torch.tensor(batch.targets, device=encoder.device)
    label_LD = encoder.embed_windows(batch.prompts)
    labels_L = torch.arange(len(batch.prompts), device=encoder.device)
    terms, vectors = [], {}
    if batch.image_rows:
        vectors["image"] = encoder.embed_images(np.stack(batch.images))
        terms.append(contrast(vectors["image"], label_LD, targets_N[batch.image_rows][:, None] == labels_L, scale))
    if batch.text_rows:
        vectors["text"] = encoder.embed_windows(batch.windows)
        terms.append(contrast(vectors["text"], label_LD, targets_N[batch.text_rows][:, None] == labels_L, scale))
    key_of = dict(zip(batch.text_rows, batch.text_keys, strict=True))
    if described := [place for place, row in enumerate(batch.image_rows) if row in key_of]:
        image_keys = torch.tensor([key_of[batch.image_rows[place]] for place in described], device=encoder.device)
        text_keys = torch.tensor(batch.text_keys, device=encoder.device)
        terms.append(contrast(vectors["image"][described], vectors["text"], image_keys[:, None] == text_keys, scale))
    return torch.stack(terms).mean()


def contrast(
    left_AD: torch.Tensor, right_BD: torch.Tensor, positive_AB: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Symmetric InfoNCE whose target is shared evenly among an item's positives (Yang et al., CVPR 2022, eq. 2 to 4).

    With one positive each it is CLIP's loss (Radford et al., ICML 2021, figure 3). Items without a positive on the
    other side ask nothing, but are still negatives of others.
    """
    logits_AB = scale * left_AD @ right_BD.T
    return 0.5 * (_soft_cross_entropy(logits_AB, positive_AB) + _soft_cross_entropy(logits_AB.T, positive_AB.T))


def _soft_cross_entropy(logits_AB: torch.Tensor, positive_AB: torch.Tensor) -> torch.Tensor:
    """Mean over the rows with a positive."""
    asked = positive_AB.any(dim=1)
    weights_AB = positive_AB[asked].to(logits_AB.dtype)
    weights_AB = weights_AB / weights_AB.sum(dim=1, keepdim=True)
    return -(weights_AB * torch.log_softmax(logits_AB[asked], dim=1)).sum(dim=1).mean()


def measure_retrieval(
    vectors: CaseVectors, texts: Sequence[str | None], *, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of cases whose image finds their text among the k nearest, and back; cases with an equal text count too.

    Args:
        vectors: of cases; those without an image or a text are left out. With fewer than two, nothing is measured.
        texts: of the same cases.
        ks: the k of recall at k.
    """
    rows = np.flatnonzero(vectors.has_image & vectors.has_text)
    if len(rows) < 2:
        return {}
    image_ND, text_ND, names = vectors.image[rows], vectors.text[rows], np.array([texts[row] for row in rows.tolist()])
    equal_NN = names[:, None] == names[None, :]
    found = {"num_cases": float(len(rows)), "chance_recall_at_1": float(equal_NN.mean())}
    for way, similarity_NN in (("image_to_text", image_ND @ text_ND.T), ("text_to_image", text_ND @ image_ND.T)):
        order = np.argsort(-similarity_NN, axis=1, kind="stable")
        hits_NN = np.take_along_axis(equal_NN, order, axis=1)
        found |= {f"{way}_recall_at_{k}": float(hits_NN[:, :k].any(axis=1).mean()) for k in ks}
    return found
