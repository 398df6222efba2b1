"""A ranking as a chat model writes it: how it is asked for, read, and counted over several samples.

Goes in: the label set and answers in words. Comes out: what a prompt asks for, the labels that an answer lists, and
scores. Names resolve by normalised form and by synonym, as they do in the evaluation; a near miss does not.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from mint_lib.clinical.disease_names import NameTable
from mint_lib.records import Label
from mint_lib.template import Template

AnswerFormat = Literal["numbered_list", "json_schema", "mint_ranked_list"]
_HEADER = "RANKED_LIST:"
_MAX_ENUM = 250  # OpenAI limits the total length of the names of longer ones
_FUZZY_RATIO = 0.9  # a near miss only has to be told from a label; it never resolves


class ReadList(NamedTuple):
    """What an answer lists."""

    columns: tuple[int, ...]
    """Places in the label set, each once, in the answer's order."""
    num_unknown: int
    """Names that are no label's."""


class RankedListReader:
    """Asks for ranked lists of one label set, and reads them."""

    def __init__(self, labels: Sequence[Label], *, answer_format: AnswerFormat, num_answers: int):
        self._format = answer_format
        self._num_answers = min(num_answers, len(labels))
        self._names = [label.name for label in labels]
        self._columns = {label.id: column for column, label in enumerate(labels)}
        self._table = NameTable(labels, diseases={}, fuzzy_ratio=_FUZZY_RATIO)
        content = {"reads": "image", "num_answers": 1, "header": _HEADER, "system": ""}
        data = yaml.safe_dump(content | {"user": f"{{num_answers}} {_HEADER}"})
        self._template = Template.from_bytes(data.encode())

    @property
    def instruction(self) -> str:
        """What the prompt says about the form of the answer."""
        which = f"exactly {self._num_answers} of the names above, most likely first, spelled as above, no explanation"
        if self._format == "json_schema":
            return f'Answer with the JSON object {{"ranked_list": ["name", ...]}}: {which}.'
        return f"List {which}, in this format:\n{_HEADER}\n1. 'name'"

    @property
    def reminder(self) -> str:
        """What is said to an answer that lists no label."""
        return f"Your answer does not have the form that was asked for. {self.instruction}"

    @property
    def fields(self) -> dict[str, Any] | None:
        """Fields of the request's body that make the endpoint keep the form."""
        if self._format == "mint_ranked_list":
            return {"answer_format": "ranked_list"}
        if self._format == "numbered_list":
            return None
        item: dict[str, Any] = {"type": "string"}
        if len(self._names) <= _MAX_ENUM:
            item["enum"] = self._names
        schema = {
            "type": "object",
            "properties": {"ranked_list": {"type": "array", "items": item}},
            "required": ["ranked_list"],
            "additionalProperties": False,
        }
        form = {"name": "ranked_list", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": form}}

    def read(self, answer: str) -> ReadList:
        """The labels that `answer` lists. What stands before `</think>` is no answer."""
        text = answer.rpartition("</think>")[2]
        names = _read_json_list(text) if self._format == "json_schema" else None
        found = [self._table.resolve(name) for name in (self._template.parse(text) if names is None else names)]
        known = dict.fromkeys(self._columns[key] for key in found if key in self._columns)
        return ReadList(tuple(known), sum(key not in self._columns for key in found))


def score_lists(lists: Sequence[Sequence[int]], *, num_labels: int) -> np.ndarray:
    """Log-scores `[label]` of several ranked lists of label places: the logarithm of the mean reciprocal rank.

    A label that a list leaves out has reciprocal rank 0 there; half the smallest mean that a listed label can have is
    added to each, so that labels without a place share one score below all others. No list: 0 for every label.
    """
    if not lists:
        return np.zeros(num_labels)
    sums = np.zeros(num_labels)
    for columns in lists:
        sums[list(columns)] += 1 / np.arange(1, len(columns) + 1)
    return np.log(sums / len(lists) + 0.5 / (num_labels * len(lists)))


def _read_json_list(text: str) -> list[str] | None:
    """The names in a JSON object, fenced or not; none where it is no such object."""
    match = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        content = json.loads(match[0]) if match else None
    except (ValueError, RecursionError):
        return None
    names = content.get("ranked_list") if isinstance(content, dict) else None
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else None
