"""An image-text dual encoder that ranks labels by how close an image and a description lie to the labels' names.

Reads a case's image, its text, or both. Zero-shot with an ensemble of prompts over names and synonyms (Radford et al.,
ICML 2021), or fine-tuned on train's pairs of image and text and on its labels, where a label's prompt is the positive
of all its cases (Yang et al., CVPR 2022). A label can be added afterwards, since its vector comes from the text tower;
a label of whose words that tower knows none is refused.
"""

import copy
import json
import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.calibration import negative_log_likelihood
from mint_lib.clip.architecture import Architecture
from mint_lib.clip.case_reader import PLACE, CaseReader, fill_prompts
from mint_lib.clip.case_views import CaseVectors, Reading, average_units, embed_cases, embed_texts
from mint_lib.clip.pool import Pool, Views, compare_with_labels, fit_pool
from mint_lib.errors import InvalidInput
from mint_lib.progress import Progress, track_progress
from mint_lib.records import Case, Label
from mint_lib.teacher import Teacher
from mint_lib.vilt.inputs import make_word_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mint_lib.clip.dual_encoder import DualEncoder


class ClipTeacher(Teacher):
    """Scores labels in the joint space of images and texts."""

    class Config(BaseModel):
        """The encoder, what it reads, and how it is fitted. Defaults are for fine-tuning a pretrained one."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        pretrained: str | None = "vinid/plip"
        """CLIP model of the Hugging Face hub or folder; none: `architecture`."""
        revision: str | None = None
        """Commit of `pretrained`."""
        architecture: Architecture | None = None
        """The small encoder; only without `pretrained`."""
        inputs: Literal["image", "text", "image_and_text"] = "image_and_text"
        """What it scores by. Training pairs images with texts wherever images are read; `text` is the control that
        never sees an image."""
        prompts: tuple[str, ...] = ("an H&E image of {label}", "a histology image of {label}", "{label}")
        """What is said of a label: `{label}` stands for its name, then for each synonym. Their mean is the label's
        vector (Radford et al. 2021, section 3.1.4)."""
        training: Literal["none", "contrastive"] = "contrastive"
        """`none`: zero-shot. Temperatures and the pool's weight are fitted on validation either way."""
        variation: Literal["tissue", "photo"] = "tissue"
        """How training images are varied: turned and stained anew, or shifted, mirrored and lit anew."""
        num_variations: int = Field(default=1, ge=1)
        """Forms of a training image, the first being the image itself. All are held in memory; the frozen tower of an
        architecture describes each once. One is enough there: its figures hardly depend on orientation."""
        learning_rate: float = Field(default=1e-5, gt=0)
        """Peak of AdamW's learning rate (Huang et al., Nat. Med. 2023, PLIP: 1e-5)."""
        weight_decay: float = Field(default=0.1, ge=0)
        """AdamW's weight decay on matrices (PLIP: 0.1)."""
        batch_size: int = Field(default=128, ge=2)
        """Cases in a step (PLIP: 128)."""
        num_epochs: int = Field(default=12, ge=1)
        """Most passes over the training cases (PLIP: 12)."""
        patience_epochs: int = Field(default=3, ge=1)
        """Stop after this many epochs without a better validation likelihood."""
        warmup_share: float = Field(default=0.1, ge=0.0, le=1.0)
        """Share of the steps in which the learning rate rises; then it falls as a cosine."""
        drop_phrase_share: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Share of a description's phrases left out in a step; the others change their order within a sentence."""

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            if (self.pretrained is None) == (self.architecture is None):
                raise ValueError("give either pretrained or architecture, and null for the other")
            if self.architecture is not None and self.training == "none":
                raise ValueError("an architecture knows nothing before training: set training to contrastive")
            if not self.prompts or any(prompt.count(PLACE) != 1 for prompt in self.prompts):
                raise ValueError(f"prompts must hold at least one text, each with {PLACE} once")
            return self

    config: Config

    def fit(self, train: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
        """Fine-tune where asked for, stopping by the validation likelihood; then fit the pool on validation."""
        import torch

        from mint_lib.clip.contrastive import measure_retrieval

        if not train and self.config.training == "contrastive":
            raise InvalidInput("The clip teacher learns from labelled training cases, and train has none.")
        columns = {label.id: column for column, label in enumerate(self.labels)}
        targets = [columns[case.label_id] for case in train if case.label_id is not None]
        truth = np.array([columns[case.label_id] for case in validation if case.label_id is not None])
        rng = np.random.default_rng(self.seed)
        num_threads = torch.get_num_threads()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self._start([case.text for case in train if case.text])
            found = self._reader.read(validation)
            history = []
            if self.config.training == "contrastive":
                readings = self._reader.read(track_progress(train, "teacher: clip reads", total=len(train)), rng)
                if self.config.architecture is not None:
                    torch.set_num_threads(1)  # matrices this small are slower on two threads
                try:
                    history = self._train(readings, targets, [case.text for case in train], found, truth, rng)
                finally:
                    torch.set_num_threads(num_threads)
        self._label_vectors = self._embed_labels(self.labels)
        self._pool = fit_pool(self._view(found), truth)
        return {
            "history": history,
            "num_parameters": sum(value.numel() for value in self._encoder.parameters()),
            "num_train": len(train),
            "num_train_without_image": sum(case.image is None for case in train),
            "num_train_without_text": sum(not case.text for case in train),
            "pool": self._pool._asdict(),
            "retrieval": measure_retrieval(self._embed(found), [case.text for case in validation]),
        }

    def score(self, cases: Sequence[Case]) -> np.ndarray:
        """Log-scores of the pool; equal ones where a case has nothing that the teacher reads."""
        with Progress("teacher: clip ranks", total=len(cases)) as progress:
            parts = []
            for start in range(0, len(cases), self.config.batch_size):
                readings = self._reader.read(cases[start : start + self.config.batch_size])
                parts.append(self._pool.apply(self._view(readings)))
                progress.advance(len(readings))
        return np.concatenate(parts)

    def add_labels(self, labels: Sequence[Label]) -> Self:
        """The same teacher over its own labels and `labels`, whose vectors come from their names alone.

        Raises:
            InvalidInput: an id is there already, or the text tower knows no word of a label.
        """
        given = [label.id for label in (*self.labels, *labels)]
        if len(set(given)) < len(given):
            raise InvalidInput("A label to add has an id that the teacher has already. Give new ids.")
        larger = copy.copy(self)
        larger.labels = (*self.labels, *labels)
        larger._label_vectors = np.concatenate([self._label_vectors, self._embed_labels(labels)])
        return larger

    def save(self, folder: pathlib.Path) -> None:
        """Write config.json, tokenizer.json and model.safetensors."""
        import torch
        from safetensors.torch import save_file

        facts = {
            "config": self.config.model_dump(mode="json"),
            "label_ids": [label.id for label in self.labels],
            "pool": self._pool._asdict(),
            "encoder": self._encoder.facts,
        }
        (folder / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True))
        self._tokenizer.no_truncation()
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str())
        weights = {name: value.cpu().contiguous() for name, value in self._encoder.state_dict().items()}
        save_file({**weights, "label_vectors": torch.from_numpy(self._label_vectors)}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: pathlib.Path, labels: Sequence[Label]) -> Self:
        """The teacher that `save` wrote.

        Raises:
            InvalidInput: it was fitted for other labels, or for these in another order.
            IntegrityError: the frozen tower is not the one that it was fitted with.
        """
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        from mint_lib.clip.dual_encoder import SmallDualEncoder
        from mint_lib.clip.pretrained_clip import PretrainedClip

        facts = json.loads((folder / "config.json").read_text())
        if facts["label_ids"] != [label.id for label in labels]:
            raise InvalidInput(
                f"The teacher was fitted for {len(facts['label_ids'])} labels, which are not the {len(labels)} given. "
                "Give the labels.json that stands beside it."
            )
        teacher = cls(cls.Config.model_validate(facts["config"]), labels, seed=0)
        small = teacher.config.architecture is not None
        encoder = SmallDualEncoder(facts["encoder"]) if small else PretrainedClip.from_facts(facts["encoder"])
        weights = load_file(folder / "model.safetensors")
        teacher._label_vectors, teacher._pool = weights.pop("label_vectors").numpy(), Pool(**facts["pool"])
        encoder.load_state_dict(weights)
        teacher._set(encoder, Tokenizer.from_str((folder / "tokenizer.json").read_text()))
        return teacher

    def _start(self, texts: Sequence[str]) -> None:
        """The tokenizer and the encoder before the first step."""
        from mint_lib.clip.dual_encoder import SmallDualEncoder
        from mint_lib.clip.pretrained_clip import PretrainedClip

        small = self.config.architecture
        if small is None:
            assert self.config.pretrained is not None
            self._set(*PretrainedClip.load(self.config.pretrained, revision=self.config.revision))
            return
        names = [name for label in self.labels for name in (label.name, *label.synonyms)]
        said = fill_prompts(self.config.prompts, names) * small.min_word_count
        tokenizer = make_word_tokenizer([*texts, *said], min_count=small.min_word_count)
        facts = small.model_dump(exclude={"min_word_count"})
        facts |= {"num_words": tokenizer.get_vocab_size(), "reads_images": self.config.inputs != "text"}
        self._set(SmallDualEncoder(facts), tokenizer)

    def _set(self, encoder: "DualEncoder", tokenizer: "Tokenizer") -> None:
        """Work with `encoder`, on the accelerator where there is one, and `tokenizer`."""
        import torch

        self._encoder = encoder.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._tokenizer = tokenizer
        self._reader = CaseReader(
            tokenizer,
            encoder,
            self.config.prompts,
            reads_images=self.config.inputs != "text",
            variation=self.config.variation,
            num_variations=self.config.num_variations,
            drop_phrase_share=self.config.drop_phrase_share,
        )

    def _train(
        self,
        readings: Sequence[Reading],
        targets: Sequence[int],
        texts: Sequence[str | None],
        found: Sequence[Reading],
        truth: np.ndarray,
        rng: np.random.Generator,
    ) -> list[dict[str, float]]:
        """Fine-tune the encoder on `readings`; the history."""
        from mint_lib.clip.contrastive import compute_loss, draw_batches
        from mint_lib.vision.fitting import TrainingPlan, fit_best_epoch

        rows = [row for row, reading in enumerate(readings) if reading.windows or reading.images is not None]
        if not rows:
            raise InvalidInput(
                f"None of the {len(readings)} training cases has what a clip teacher with inputs {self.config.inputs} "
                "reads. Change inputs, or give cases with images or texts."
            )
        readings, targets = [readings[row] for row in rows], [targets[row] for row in rows]
        if images := [reading.images for reading in readings if reading.images is not None]:
            self._encoder.standardise(np.concatenate(images))
        keys = {text: key for key, text in enumerate(dict.fromkeys(texts))}
        text_keys = [keys[texts[row]] for row in rows]
        prompts = [[windows[0] for windows in self._reader.say(label)] for label in self.labels]

        def evaluate() -> dict[str, float]:
            self._label_vectors = self._embed_labels(self.labels)
            scores = Pool().apply(self._view(found))
            return {
                "validation_nll": negative_log_likelihood(scores, truth),
                "validation_top_1": float((scores.argmax(axis=1) == truth).mean()),
            }

        return fit_best_epoch(
            self._encoder,
            TrainingPlan(**self.config.model_dump(include=set(TrainingPlan._fields))),
            draw_epoch=lambda: draw_batches(
                readings,
                targets,
                text_keys,
                prompts,
                rng,
                vary=self._reader.vary_window,
                batch_size=self.config.batch_size,
            ),
            compute_loss=lambda batch: compute_loss(self._encoder, batch),
            num_batches=math.ceil(len(readings) / self.config.batch_size),
            evaluate=evaluate,
            description="teacher: clip learns",
        )

    def _embed_labels(self, labels: Sequence[Label]) -> np.ndarray:
        """Unit vectors [L, D]: the mean over a label's prompts; of names that the text tower cannot read, none.

        Raises:
            InvalidInput: it can read no name of a label.
        """
        return np.stack([average_units(embed_texts(self._encoder, self._reader.say(label))) for label in labels])

    def _view(self, readings: Sequence[Reading]) -> Views:
        """Log-probabilities by the views that the config lets score."""
        vectors = self._embed(readings)
        views = compare_with_labels(vectors, self._label_vectors, scale=self._encoder.scale().item())
        return views._replace(has_text=np.zeros_like(views.has_text)) if self.config.inputs == "image" else views

    def _embed(self, readings: Sequence[Reading]) -> CaseVectors:
        self._encoder.eval()
        return embed_cases(self._encoder, readings, batch_size=self.config.batch_size)
