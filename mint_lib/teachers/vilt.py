"""A classifier over face photo and clinical text in GestaltMML's shape: ViLT with a two-layer head over the label set.

Reads a case's text and photo; learns from the labelled cases of train. Differs from GestaltMML's training where that
has a defect: a missing face is masked neutral grey, not the first patient's face; a long text is read in windows, not
cut at 40 tokens; words stay whole; weight decay, a schedule, and the best epoch on validation is kept. The photo and
the text of a case are dropped in turn, so the teacher works with either. Kim et al., ICML 2021; Wu et al. 2024.
"""

import json
import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.errors import InvalidInput
from mint_lib.progress import Progress
from mint_lib.records import Case, Label
from mint_lib.teacher import Teacher
from mint_lib.vilt.inputs import (
    CELL_PIXELS,
    EDGE_DIRECTIONS,
    PHRASE_ENDS,
    find_edges,
    make_word_tokenizer,
    read_photo,
    scale_pixels,
    split_windows,
    vary_findings,
    vary_photo,
)
from mint_lib.vilt.model import Batch, build_network, compute_logits, compute_loss, standardise_photos


class Architecture(BaseModel):
    """A ViLT trained from its first weight, for small machines."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    hidden_size: int = Field(default=64, ge=8)
    """Width H of the transformer; a multiple of num_heads."""
    num_layers: int = Field(default=2, ge=1)
    """Transformer layers."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    image_size: int = Field(default=64, ge=16)
    """Side of the square photo in pixels; a multiple of patch_size."""
    patch_size: int = Field(default=16, ge=4)
    """Side of a patch in pixels."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of activations dropped in training."""
    min_word_count: int = Field(default=2, ge=1)
    """Words rarer than this in the training texts share one token."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.num_heads or self.image_size % self.patch_size or self.patch_size % CELL_PIXELS:
            raise ValueError(
                "hidden_size must be a multiple of num_heads, image_size of patch_size, and patch_size of "
                f"{CELL_PIXELS}"
            )
        return self


class Reading(NamedTuple):
    """A case as the model reads it."""

    windows: list[list[int]]
    """Token ids of the text's windows; none where there is no text."""
    photo: np.ndarray | None
    """RGB bytes [3, S, S]."""


class ViltTeacher(Teacher):
    """Scores labels by photo and text together."""

    class Config(BaseModel):
        """The model and how it is fitted. Defaults: GestaltMML's training notebook, where it states a value."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        pretrained: str | None = "dandelin/vilt-b32-mlm"
        """Model of the Hugging Face hub or folder that fitting starts from; none: `architecture`, from scratch."""
        revision: str | None = None
        """Commit of `pretrained`."""
        architecture: Architecture | None = None
        """The small model; only without `pretrained`."""
        inputs: Literal["face_and_text", "text_only"] = "face_and_text"
        """`text_only` masks every photo: the control that says how much the face adds."""
        max_text_tokens: int = Field(default=40, ge=8)
        """Tokens the model reads at once (ViLT's pretrained weights: 40). A longer text is read in several windows
        whose log-probabilities are averaged; nothing is cut off."""
        learning_rate: float = Field(default=5e-5, gt=0)
        """Peak of AdamW's learning rate (GestaltMML: 5e-5)."""
        weight_decay: float = Field(default=0.01, ge=0)
        """AdamW's weight decay on matrices (Kim et al. 2021: 0.01)."""
        batch_size: int = Field(default=64, ge=1)
        """Cases in a step (GestaltMML: 64)."""
        num_epochs: int = Field(default=10, ge=1)
        """Most passes over the training cases; each draws its own variation of a case (GestaltMML: 10)."""
        patience_epochs: int = Field(default=3, ge=1)
        """Stop after this many epochs without a better validation likelihood."""
        warmup_share: float = Field(default=0.1, ge=0.0, le=1.0)
        """Share of the steps in which the learning rate rises; then it falls as a cosine (Kim et al. 2021: 0.1)."""
        drop_face_share: float = Field(default=1 / 3, ge=0.0, le=1.0)
        """Share of a case's variations without its photo (GestaltMML: a third)."""
        drop_text_share: float = Field(default=1 / 3, ge=0.0, le=1.0)
        """Share of a case's variations without its text (GestaltMML: a third)."""
        drop_finding_share: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share of a text's phrases left out of a variation; the others change their order within a sentence."""

        @model_validator(mode="after")
        def _names_one_model(self) -> Self:
            if (self.pretrained is None) == (self.architecture is None):
                raise ValueError("give either pretrained or architecture, and null for the other")
            if self.drop_face_share + self.drop_text_share > 1:
                raise ValueError("drop_face_share and drop_text_share add up to more than 1")
            return self

    config: Config

    def fit(self, train: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
        """Train with early stopping on the validation likelihood; tells the history and how the cases were read."""
        import torch

        from mint_lib.vision.fitting import TrainingPlan, fit_best_epoch

        if not train:
            raise InvalidInput("The vilt teacher learns from labelled training cases, and train has none.")
        if self.config.architecture is not None and not torch.cuda.is_available():
            torch.set_num_threads(1)  # matrices this small are slower on two threads, and far slower on busy ones
        columns = {label.id: column for column, label in enumerate(self.labels)}
        targets = [columns[case.label_id] for case in train if case.label_id is not None]
        truth = np.array([columns[case.label_id] for case in validation if case.label_id is not None])
        rng = np.random.default_rng(self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self._start([case.text for case in train if case.text])
            readings = self._read(train)
            validation_readings = self._read(validation)
            photos = [prepared for item in readings if (prepared := self._prepare(item.photo)) is not None]
            if self.config.architecture is not None and photos:
                standardise_photos(self._network, photos)
            history = fit_best_epoch(
                self._network,
                TrainingPlan(**self.config.model_dump(include=set(TrainingPlan._fields))),
                draw_epoch=lambda: self._draw_epoch(readings, targets, rng),
                compute_loss=lambda batch: compute_loss(self._network, batch),
                num_batches=math.ceil(len(train) / self.config.batch_size),
                evaluate=lambda: _measure(self._score(validation_readings), truth),
                description="teacher: vilt learns",
            )
        return {
            "history": history,
            "num_parameters": sum(value.numel() for value in self._network.parameters()),
            "num_train": len(train),
            "num_train_without_photo": sum(reading.photo is None for reading in readings),
            "num_train_without_text": sum(not reading.windows for reading in readings),
            "num_train_with_several_windows": sum(len(reading.windows) > 1 for reading in readings),
        }

    def score(self, cases: Sequence[Case]) -> np.ndarray:
        """Log-probabilities; those of a text's windows are averaged."""
        with Progress("teacher: vilt ranks", total=len(cases)) as progress:
            parts = []
            for start in range(0, len(cases), self.config.batch_size):
                readings = self._read(cases[start : start + self.config.batch_size])
                parts.append(self._score(readings))
                progress.advance(len(readings))
        return np.concatenate(parts)

    def save(self, folder: pathlib.Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors."""
        from safetensors.torch import save_file

        facts = {
            "config": self.config.model_dump(mode="json"),
            "label_ids": [label.id for label in self.labels],
            "vilt": self._network["encoder"].config.to_diff_dict(),
        }
        (folder / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
        self._tokenizer.no_truncation()
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str())
        save_file(
            {name: value.cpu().contiguous() for name, value in self._network.state_dict().items()},
            folder / "model.safetensors",
        )

    @classmethod
    def load(cls, folder: pathlib.Path, labels: Sequence[Label]) -> Self:
        """The teacher that `save` wrote.

        Raises:
            InvalidInput: it was fitted for other labels, or for these in another order.
        """
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import ViltConfig

        facts = json.loads((folder / "config.json").read_text())
        if facts["label_ids"] != [label.id for label in labels]:
            raise InvalidInput(
                f"The teacher was fitted for {len(facts['label_ids'])} labels, which are not the {len(labels)} given. "
                "Give the labels.json that stands beside it."
            )
        teacher = cls(cls.Config.model_validate(facts["config"]), labels, seed=0)
        teacher._tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text())
        teacher._network = build_network(ViltConfig.from_dict(facts["vilt"]), len(labels))
        teacher._network.load_state_dict(load_file(folder / "model.safetensors"))
        return teacher

    def _start(self, texts: Sequence[str]) -> None:
        """The tokenizer and the network before the first step."""
        from transformers import AutoTokenizer, ViltConfig, ViltModel

        small, source, revision = self.config.architecture, self.config.pretrained, self.config.revision
        if small is not None:
            self._tokenizer = make_word_tokenizer(texts, min_count=small.min_word_count)
            vilt_config = ViltConfig(
                vocab_size=self._tokenizer.get_vocab_size(),
                hidden_size=small.hidden_size,
                num_hidden_layers=small.num_layers,
                num_attention_heads=small.num_heads,
                intermediate_size=4 * small.hidden_size,
                hidden_dropout_prob=small.dropout,
                attention_probs_dropout_prob=small.dropout,
                num_channels=EDGE_DIRECTIONS,
                image_size=small.image_size // CELL_PIXELS,
                patch_size=small.patch_size // CELL_PIXELS,
                max_position_embeddings=self.config.max_text_tokens,
            )
            self._network = build_network(vilt_config, len(self.labels))
            return
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        self._tokenizer = tokenizer.backend_tokenizer
        encoder = ViltModel.from_pretrained(source, revision=revision, use_safetensors=True, trust_remote_code=False)
        if self.config.max_text_tokens > encoder.config.max_position_embeddings:
            raise InvalidInput(
                f"max_text_tokens {self.config.max_text_tokens} is more than the "
                f"{encoder.config.max_position_embeddings} tokens that {source} reads at once. Lower it: a longer text "
                "is read in several windows."
            )
        self._network = build_network(encoder.config, len(self.labels), encoder=encoder)

    def _read(self, cases: Sequence[Case]) -> list[Reading]:
        """What the model may see of `cases`."""
        small = self.config.architecture
        side_pixels = small.image_size if small is not None else self._network["encoder"].config.image_size
        readings = []
        for case in cases:
            text, image = case.text, case.image if self.config.inputs == "face_and_text" else None
            readings.append(
                Reading(
                    split_windows(self._tokenizer, text, window_tokens=self.config.max_text_tokens) if text else [],
                    read_photo(image, side_pixels=side_pixels, case_id=case.case_id) if image else None,
                )
            )
        return readings

    def _score(self, readings: Sequence[Reading]) -> np.ndarray:
        """Log-probabilities [case, label]."""
        import torch

        self._network.eval()
        parts = [(row, ids) for row, reading in enumerate(readings) for ids in reading.windows or [self._empty]]
        parts.sort(key=lambda part: len(part[1]))
        scores = np.zeros((len(readings), len(self.labels)))
        with torch.inference_mode():
            for start in range(0, len(parts), self.config.batch_size):
                rows, texts = zip(*parts[start : start + self.config.batch_size], strict=True)
                logits_BL = compute_logits(
                    self._network, Batch(texts, [self._prepare(readings[row].photo) for row in rows])
                )
                for row, values in zip(rows, torch.log_softmax(logits_BL.double(), -1).cpu().numpy(), strict=True):
                    scores[row] += values / max(1, len(readings[row].windows))
        return scores

    def _prepare(self, photo: np.ndarray | None) -> np.ndarray | None:
        """`photo` as the encoder's channels: edges for the small model, pixels for pretrained weights."""
        if photo is None:
            return None
        return scale_pixels(photo) if self.config.architecture is None else find_edges(photo)

    @property
    def _empty(self) -> list[int]:
        """Token ids of a text without words."""
        return list(self._tokenizer.encode("").ids)

    def _draw_epoch(
        self, readings: Sequence[Reading], targets: Sequence[int], rng: np.random.Generator
    ) -> Iterator[Batch]:
        """Batches of one pass, every case in a variation of its own."""
        order = rng.permutation(len(readings))
        for start in range(0, len(order), self.config.batch_size):
            rows = order[start : start + self.config.batch_size]
            texts, photos = zip(*(self._vary(readings[row], rng) for row in rows), strict=True)
            yield Batch(texts, [self._prepare(photo) for photo in photos], [targets[row] for row in rows])

    def _vary(self, reading: Reading, rng: np.random.Generator) -> tuple[list[int], np.ndarray | None]:
        """One window of the text with findings left out, and the photo; one of both is dropped where there are both."""
        draw, place = rng.random(), int(rng.integers(max(1, len(reading.windows))))
        photo = None if reading.photo is None else vary_photo(reading.photo, rng)
        if not reading.windows:
            return self._empty, photo
        first, *words, last = reading.windows[place]
        separators = [self._tokenizer.token_to_id(mark) for mark in PHRASE_ENDS]
        kept = vary_findings(words, rng, separators=separators, drop_share=self.config.drop_finding_share)
        if photo is not None and draw < self.config.drop_face_share:
            photo = None
        elif photo is not None and draw > 1 - self.config.drop_text_share:
            kept = []
        return [first, *kept, last], photo


def _measure(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Figures of an epoch on validation."""
    return {
        "validation_nll": -float(scores[np.arange(len(truth)), truth].mean()),
        "validation_top_1": float((scores.argmax(axis=1) == truth).mean()),
    }
