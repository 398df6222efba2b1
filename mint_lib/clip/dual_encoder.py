"""Two towers whose vectors meet in one space: what a CLIP teacher embeds images and texts with.

Goes in: image arrays and windows of token ids. Comes out: unit vectors of one width. `SmallDualEncoder` is a frozen
vision tower under a trained projection beside a small text transformer, for CPUs. Knows neither cases nor labels. It
imports torch at its top, so import it where it is needed.

Shape suffixes: B items, T tokens, H hidden size, F figures of the tower, D joint width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mint_lib.vision.tower import FrozenTower

_MAX_LOG_SCALE = math.log(100)
"""Radford et al. 2021, section 2.5: larger scales make training unstable."""
_FIRST_LOG_SCALE = math.log(1 / 0.07)
"""Radford et al. 2021, section 2.5."""


class DualEncoder(nn.Module, ABC):
    """What both kinds do."""

    image_size: int
    """Side of the images that `read_images` takes."""
    max_text_tokens: int
    """Tokens of a window."""
    joint_size: int
    """Width of the vectors."""
    facts: dict[str, Any]
    """What it is made of again, beside the weights."""

    @abstractmethod
    def read_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """What `embed_images` takes, of RGB bytes `[3, S, S]`: everything that training does not change."""

    @abstractmethod
    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors [B, D] of what `read_images` made."""

    @abstractmethod
    def embed_windows(self, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Unit vectors [B, D] of token ids."""

    def standardise(self, images: np.ndarray) -> None:
        """Learn how far apart the figures of `images` lie, before the first step; pretrained weights know it."""

    @abstractmethod
    def _log_scale(self) -> nn.Parameter:
        """Logarithm of the inverse temperature."""

    def scale(self) -> torch.Tensor:
        """Inverse temperature of the similarities, at most 100."""
        log_scale = self._log_scale()
        with torch.no_grad():
            log_scale.clamp_(max=_MAX_LOG_SCALE)
        return log_scale.exp()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._log_scale().device

    def _pad(self, windows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, [B, T]."""
        length = max(map(len, windows))
        ids_BT = torch.tensor([[*window, *[pad_id] * (length - len(window))] for window in windows])
        mask_BT = torch.tensor([[1] * len(window) + [0] * (length - len(window)) for window in windows])
        return ids_BT.to(self.device), mask_BT.to(self.device)


class SmallDualEncoder(DualEncoder):
    """A projection of a frozen tower's figures, and a transformer over words whose mean is projected."""

    def __init__(self, facts: dict[str, Any]):
        """Fresh weights from the random state.

        Args:
            facts: `num_words` of the tokenizer; `reads_images`; `image_size` of the FrozenTower; sizes `hidden_size`,
                `num_layers`, `num_heads`, `joint_size` and `max_text_tokens`; `dropout`; and `tower_digest`, where the
                weights were fitted with a tower.

        Raises:
            IntegrityError: the tower is not the one of `tower_digest`.
        """
        super().__init__()
        width, joint = facts["hidden_size"], facts["joint_size"]
        self.image_size, self.max_text_tokens, self.joint_size = facts["image_size"], facts["max_text_tokens"], joint
        self._towers, num_figures = [], 0
        if facts["reads_images"]:
            tower = FrozenTower(None, revision=None, image_size=facts["image_size"])
            tower.check(facts.get("tower_digest"))
            facts = {**facts, "tower_digest": tower.digest}
            self._towers, num_figures = [tower], tower.num_figures
        self.facts = facts
        self.words = nn.Embedding(facts["num_words"], width)
        self.positions = nn.Parameter(torch.randn(self.max_text_tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, facts["num_heads"], 4 * width, facts["dropout"], activation="gelu", batch_first=True, norm_first=True
        )
        self.text = nn.TransformerEncoder(layer, facts["num_layers"], enable_nested_tensor=False)
        self.text_projection = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, joint))
        if facts["reads_images"]:
            self.image_projection = nn.Sequential(nn.Dropout(facts["dropout"]), nn.Linear(num_figures, joint))
            self.register_buffer("figure_mean", torch.zeros(num_figures))
            self.register_buffer("figure_scale", torch.ones(num_figures))
        self.logit_scale = nn.Parameter(torch.tensor(_FIRST_LOG_SCALE))

    def standardise(self, images: np.ndarray) -> None:
        """Read every figure as its distance from the mean of `images` [B, F], in deviations."""
        self.get_buffer("figure_mean").copy_(torch.from_numpy(images.mean(axis=0)))
        self.get_buffer("figure_scale").copy_(torch.from_numpy(images.std(axis=0) + 1e-6))

    def read_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Figures [B, F] of the frozen tower."""
        figures: np.ndarray = self._towers[0].describe(images)
        return figures

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors [B, D]."""
        figures_BF = (torch.from_numpy(images).to(self.device) - self.figure_mean) / self.figure_scale
        return nn.functional.normalize(self.image_projection(figures_BF), dim=-1)

    def embed_windows(self, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Unit vectors [B, D]."""
        ids_BT, mask_BT = self._pad(windows, 0)
        hidden_BTH = self.words(ids_BT) + self.positions[: ids_BT.shape[1]]
        hidden_BTH = self.text(hidden_BTH, src_key_padding_mask=mask_BT == 0)
        weights_BT1 = mask_BT[..., None].to(hidden_BTH.dtype)
        mean_BH = (hidden_BTH * weights_BT1).sum(1) / weights_BT1.sum(1)
        return nn.functional.normalize(self.text_projection(mean_BH), dim=-1)

    def _log_scale(self) -> nn.Parameter:
        return self.logit_scale
