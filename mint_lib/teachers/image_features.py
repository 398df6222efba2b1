"""Logistic regression on figures of the image: what a simple look at a tile is worth, as a baseline.

`colour` sees no places, `texture` sees the haematoxylin stain without its strength, `tower` is the linear probe of a
frozen vision tower. Reads images only, learns from the labelled cases of train, and takes the penalty with the best
likelihood on validation. It says nothing of a case without an image.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.calibration import negative_log_likelihood
from mint_lib.errors import InvalidInput
from mint_lib.progress import track_progress
from mint_lib.records import Case, Label
from mint_lib.teacher import Teacher
from mint_lib.vilt.inputs import read_photo
from mint_lib.vision.colour_texture import describe_colours, describe_texture

if TYPE_CHECKING:
    from mint_lib.vision.tower import FrozenTower

_MAX_STEPS = 1000
_BATCH_IMAGES = 32


class ImageFeaturesTeacher(Teacher):
    """Scores labels by a linear model of an image's figures."""

    class Config(BaseModel):
        """Which figures, and how strongly their weights may be penalised."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        features: Literal["colour", "texture", "tower"]
        """Figures of an image."""
        image_size: int = Field(default=128, ge=32)
        """Side in pixels to which an image is stretched; a multiple of 32 for the embedded tower."""
        tower: str | None = None
        """CLIP or SigLIP model of the Hugging Face hub or folder; none: the embedded EfficientNet-Lite0."""
        revision: str | None = None
        """Commit of `tower`."""
        penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0)
        """Weights of the squared norm that are tried, the loss being the sum over cases (scikit-learn's 1 / C)."""

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            if self.features == "tower" and self.tower is None and self.image_size % 32:
                raise ValueError("image_size must be a multiple of 32 for the embedded tower")
            if self.features != "tower" and (self.tower, self.revision) != (None, None):
                raise ValueError("tower and revision are for features: tower")
            if not self.penalties or min(self.penalties) <= 0:
                raise ValueError("penalties must hold at least one number, all above 0")
            return self

    config: Config

    def __init__(self, config: Config, labels: Sequence[Label], *, seed: int):
        super().__init__(config, labels, seed=seed)
        self._tower = self._load_tower()

    def fit(self, train: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
        """One regression for each penalty, the best on validation kept; tells the likelihood of each."""
        from sklearn.linear_model import LogisticRegression

        train, seen = ([case for case in cases if case.image] for cases in (train, validation))
        targets, truth = self._columns(train), self._columns(seen)
        if len(set(targets)) < 2 or not seen:
            raise InvalidInput(
                f"The image_features teacher needs labelled images of 2 labels in train, not {len(set(targets))}, and "
                f"one in validation, which has {len(seen)}."
            )
        figures, validation_figures = self._describe(train), self._describe(seen)
        self._mean, self._deviation = figures.mean(axis=0), figures.std(axis=0) + 1e-9
        standard = (figures - self._mean) / self._deviation
        tried = []
        for penalty in self.config.penalties:
            model = LogisticRegression(C=1 / penalty, max_iter=_MAX_STEPS).fit(standard, targets)
            self._weights, self._bias = self._spread(model.classes_, model.coef_, model.intercept_, len(train))
            loss = negative_log_likelihood(self._apply(validation_figures), truth)
            tried.append((loss, penalty, self._weights, self._bias))
        _, penalty, self._weights, self._bias = min(tried, key=lambda item: item[0])
        return {
            "num_figures": figures.shape[1],
            "num_train": len(train),
            "penalty": penalty,
            "validation_nll": {f"{penalty:g}": loss for loss, penalty, _, _ in tried},
        }

    def score(self, cases: Sequence[Case]) -> np.ndarray:
        """Log-odds of the labels; zeros for a case without an image."""
        scores = np.zeros((len(cases), len(self.labels)))
        rows = [row for row, case in enumerate(cases) if case.image]
        if rows:
            scores[rows] = self._apply(self._describe([cases[row] for row in rows]))
        return scores

    def save(self, folder: pathlib.Path) -> None:
        """Write config.json and model.safetensors."""
        from safetensors.numpy import save_file

        facts = {
            "config": self.config.model_dump(mode="json"),
            "label_ids": [label.id for label in self.labels],
            "tower_digest": self._tower.digest if self._tower is not None else None,
        }
        (folder / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
        weights = {"mean": self._mean, "deviation": self._deviation, "weights": self._weights, "bias": self._bias}
        save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: pathlib.Path, labels: Sequence[Label]) -> Self:
        """The teacher that `save` wrote.

        Raises:
            InvalidInput: it was fitted for other labels, or for these in another order.
            IntegrityError: the tower is not the one that it was fitted with.
        """
        from safetensors.numpy import load_file

        facts = json.loads((folder / "config.json").read_text())
        if facts["label_ids"] != [label.id for label in labels]:
            raise InvalidInput(
                f"The teacher was fitted for {len(facts['label_ids'])} labels, which are not the {len(labels)} given. "
                "Give the labels.json that stands beside it."
            )
        teacher = cls(cls.Config.model_validate(facts["config"]), labels, seed=0)
        if teacher._tower is not None:
            teacher._tower.check(facts["tower_digest"])
        weights = load_file(folder / "model.safetensors")
        teacher._mean, teacher._deviation = weights["mean"], weights["deviation"]
        teacher._weights, teacher._bias = weights["weights"], weights["bias"]
        return teacher

    def _load_tower(self) -> "FrozenTower | None":
        """The tower, where the figures are a tower's."""
        if self.config.features != "tower":
            return None
        from mint_lib.vision.tower import FrozenTower

        return FrozenTower(
            self.config.tower,
            revision=self.config.revision,
            image_size=self.config.image_size,
        )

    def _columns(self, cases: Sequence[Case]) -> np.ndarray:
        """Places of the cases' labels in the label set."""
        columns = {label.id: column for column, label in enumerate(self.labels)}
        return np.array([columns[case.label_id] for case in cases if case.label_id is not None], dtype=int)

    def _describe(self, cases: Sequence[Case]) -> np.ndarray:
        """Figures `[case, figure]` of cases that have an image."""
        parts = []
        starts = range(0, len(cases), _BATCH_IMAGES)
        for start in track_progress(starts, f"teacher: {self.config.features} figures", total=len(starts)):
            images = [
                read_photo(case.image or b"", side_pixels=self.config.image_size, case_id=case.case_id)
                for case in cases[start : start + _BATCH_IMAGES]
            ]
            if self._tower is not None:
                parts.append(self._tower.describe(images).astype(np.float64))
            else:
                describe = describe_colours if self.config.features == "colour" else describe_texture
                parts.append(np.stack([describe(image) for image in images]))
        return np.concatenate(parts)

    def _apply(self, figures: np.ndarray) -> np.ndarray:
        """Log-odds `[case, label]`."""
        scores: np.ndarray = (figures - self._mean) / self._deviation @ self._weights.T + self._bias
        return scores

    def _spread(
        self, found: np.ndarray, weights: np.ndarray, bias: np.ndarray, num_train: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Weights and bias over the whole label set, from those of the labels `found` in train.

        A label without a training case gets odds of 1 to the number of cases against the mean of the others, so it
        never comes first.
        """
        if len(found) == 2:  # scikit-learn keeps one row, the second label's against the first
            weights, bias = np.concatenate([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
        spread_weights, spread_bias = np.zeros((len(self.labels), weights.shape[1])), np.zeros(len(self.labels))
        spread_bias -= np.log(num_train)
        spread_weights[found], spread_bias[found] = weights, bias
        return spread_weights, spread_bias
