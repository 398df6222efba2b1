"""A chat model behind an OpenAI-compatible endpoint ranks the label set, in one question or in a chain of them.

Reads a case's image, text or both, as declared; learns nothing, so no label is seen: how its ranks become probabilities
is the one temperature that the stage fits on validation. The score of a label is the logarithm of its mean reciprocal
rank over the samples; labels that no answer lists share the lowest score. A ranking that lists no label is asked for
once more; then the case gets equal scores and is counted. Answers are kept in the cache folder, so a repeated run asks
only what is missing; the trace of every run lies beside them.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.chat.case_ranker import CaseRanker, RankedCase
from mint_lib.chat.chain import Inputs, Step, check_steps
from mint_lib.chat.client import ChatClient
from mint_lib.chat.endpoint import Endpoint
from mint_lib.chat.ranked_list import AnswerFormat, RankedListReader
from mint_lib.errors import IntegrityError, InvalidInput, RefusedData
from mint_lib.progress import Progress
from mint_lib.records import Case, Label
from mint_lib.student_weights import cache_folder
from mint_lib.teacher import Teacher

logger = logging.getLogger(__name__)


class ChatTeacher(Teacher):
    """Ranks labels by asking a chat model."""

    class Config(BaseModel):
        """Whom it asks, what it shows, and in which steps."""

        model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

        endpoint: Endpoint
        """Where the model answers, what it may see and cost."""
        inputs: Inputs
        """What is sent of a case. With `image_and_text` a case may have only one of them."""
        steps: tuple[Step, ...] = Field(min_length=1, max_length=8)
        """The questions, in order; the last one ranks the label set."""
        num_answers: int = Field(default=5, ge=1, le=99)
        """Names that the last step asks for."""
        answer_format: AnswerFormat = "numbered_list"
        """How a ranking is written: `json_schema` where the endpoint offers structured output, `mint_ranked_list` where
        it is a MINT model server, which then answers within its own label set."""
        temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
        """Of all steps; null: the endpoint's own, for models that accept no other."""
        num_samples: int = Field(default=1, ge=1, le=64)
        """How often the whole chain is run for each case. More than one needs a temperature above 0."""
        max_unparsed_share: float = Field(default=0.05, ge=0.0, le=1.0)
        """Largest share of cases without an answer that lists a label."""
        trace_content: bool = False
        """Messages and answers stand in the trace too. They are content of cases."""

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            check_steps(self.steps, inputs=self.inputs)
            if self.num_samples > 1 and self.temperature == 0.0:
                raise ValueError("num_samples above 1 needs a temperature above 0: at 0 all samples are equal")
            return self

    config: Config

    def __init__(self, config: Config, labels: Sequence[Label], *, seed: int):
        super().__init__(config, labels, seed=seed)
        self._client = ChatClient(config.endpoint, folder=cache_folder() / "chat", keeps_content=config.trace_content)
        self._ranker = CaseRanker(
            self._client,
            config.steps,
            RankedListReader(labels, answer_format=config.answer_format, num_answers=config.num_answers),
            labels=labels,
            temperature=config.temperature,
            num_samples=config.num_samples,
        )
        self._ranked: dict[str, RankedCase] = {}

    def fit(self, train: Sequence[Case], validation: Sequence[Case]) -> dict[str, Any]:
        """Nothing is learnt and nobody is asked; tells who will be."""
        endpoint = self.config.endpoint
        return {"host": endpoint.host, "model": endpoint.model, "steps": [step.name for step in self.config.steps]}

    def score(self, cases: Sequence[Case]) -> np.ndarray:
        """Logarithms of mean reciprocal ranks. What was asked before is not asked again.

        Raises:
            InvalidInput: cases lack what is to be shown, or the endpoint refuses the requests.
            RefusedData: more than `max_unparsed_share` of the cases have no answer that lists a label.
            GateFailed: the budget is used up.
            ServingError: the endpoint gave no answer, after all attempts.
        """
        self._check_inputs(cases)
        keys = [_digest_case(case) for case in cases]
        waiting = {key: case for key, case in zip(keys, cases, strict=True) if key not in self._ranked}
        num_unparsed, num_threads = 0, self.config.endpoint.num_concurrent
        with (
            Progress("teacher: chat", total=len(cases)) as progress,
            contextlib.closing(self._ranker.rank_all(waiting, num_threads=num_threads)) as ranking,
        ):
            progress.advance(len(cases) - len(waiting))
            for key, ranked in ranking:
                self._ranked[key] = ranked
                num_unparsed += not ranked.is_parsed
                if num_unparsed > self.config.max_unparsed_share * len(cases):
                    break  # no need to pay for the rest
                progress.advance(unparsed=num_unparsed)
        self._check_share(cases, keys)
        facts = self.facts()
        told = {name: facts[name] for name in ("num_cases", "num_calls", "num_cached", "num_unparsed", "cost")}
        logger.info("teacher: chat: so far %s", ", ".join(f"{name}={value:g}" for name, value in told.items()))
        return np.stack([self._ranked[key].scores for key in keys])

    def facts(self) -> dict[str, Any]:
        """Calls, tokens and cost so far, and how many cases have no answer that lists a label."""
        ranked = self._ranked.values()
        return self._client.summary() | {
            "num_cases": len(ranked),
            "num_unparsed": sum(not item.is_parsed for item in ranked),
            "num_reminders": sum(item.num_reminders for item in ranked),
            "num_unknown_names": sum(item.num_unknown_names for item in ranked),
        }

    def trace(self) -> bytes:
        """A line of JSON for each call so far, ordered by case."""
        return self._client.trace.dump()

    def save(self, folder: pathlib.Path) -> None:
        """Write the config and the prompts as they are sent, label names included."""
        facts = {"config": self.config.model_dump(mode="json"), "prompts": self._ranker.describe_prompts()}
        (folder / "config.json").write_text(json.dumps(facts, indent=1, sort_keys=True))

    @classmethod
    def load(cls, folder: pathlib.Path, labels: Sequence[Label]) -> Self:
        """The teacher that `save` wrote.

        Raises:
            IntegrityError: this code writes other prompts for these labels than the teacher was saved with.
        """
        facts = json.loads((folder / "config.json").read_text())
        teacher = cls(cls.Config.model_validate(facts["config"]), labels, seed=0)
        if teacher._ranker.describe_prompts() != facts["prompts"]:
            raise IntegrityError(
                "This version of the code writes other prompts for these labels than the teacher was saved with. Make "
                "the teacher again."
            )
        return teacher

    def _check_inputs(self, cases: Sequence[Case]) -> None:
        """Raise InvalidInput where cases lack what is to be shown."""
        wanted = self.config.inputs
        if wanted == "image_and_text":
            return
        bare = [case.case_id for case in cases if not (case.image if wanted == "image" else (case.text or "").strip())]
        if bare:
            raise InvalidInput(
                f"{len(bare)} of {len(cases)} cases have no {wanted} to show: {', '.join(bare[:20])}. Leave them out, "
                "or set teacher.config.inputs to what all cases have."
            )

    def _check_share(self, cases: Sequence[Case], keys: Sequence[str]) -> None:
        """Raise RefusedData where too many of `cases` have no answer that lists a label."""
        asked = [(case, self._ranked[key]) for key, case in zip(keys, cases, strict=True) if key in self._ranked]
        unparsed = sorted(case.case_id for case, ranked in asked if not ranked.is_parsed)
        if len(unparsed) > self.config.max_unparsed_share * len(cases):
            raise RefusedData(
                f"{self.config.endpoint.model} lists no label for {len(unparsed)} of {len(asked)} cases asked about "
                f"({len(cases)} in all), even after a reminder of the form; max_unparsed_share allows "
                f"{self.config.max_unparsed_share:g}. Cases: {', '.join(unparsed[:20])}. Give the last step more "
                "max_tokens, mend its prompt, or use answer_format: json_schema where the endpoint offers it.",
                {"unparsed": len(unparsed), "asked": len(asked), "cases": len(cases)},
                {"unparsed": unparsed[:20]},
            )


def _digest_case(case: Case) -> str:
    """sha256 of what of a case can be shown: its text and its image."""
    parts = (f"{case.text!r}".encode(), case.image or b"")
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
