"""Note answers: asks a student about notes that are no case's, for probes that alter notes.

Goes in: the test material and a student. Comes out: a function from cases to the student's rankings, and one that says
whether a case can be asked about at all. It knows neither what was altered nor what is right.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mint_lib.progress import Progress
from mint_lib.reading import Reader
from mint_lib.records import Case
from mint_lib.reporting.injections import AskCases, FitsWindow
from mint_lib.reporting.material import Material, count_prompt_tokens
from mint_lib.student import encode_first_items, rank_labels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ask_notes(material: Material, model: "PreTrainedModel", reader: Reader, *, description: str) -> AskCases:
    """A function that ranks the label set for each case, as the test cases are ranked."""
    ids = [label.id for label in material.labels]

    def ask(cases: Sequence[Case]) -> list[tuple[str, ...]]:
        prompts = [material.template.question(case).turns for case in cases]
        with Progress(description, total=len(prompts)) as progress:
            scores_NL = rank_labels(
                model, reader, material.template, material.labels, prompts, progress=progress.advance
            )
        order_NL = np.argsort(-scores_NL, axis=1, kind="stable")
        return [tuple(ids[column] for column in order_L) for order_L in order_NL]

    return ask


def fit_window(material: Material, reader: Reader, *, window_tokens: int) -> FitsWindow:
    """A function that says whether the question about a case and the longest name fit `window_tokens`."""
    answers = encode_first_items(reader.tokenizer, material.template, material.labels)
    room = window_tokens - max(map(len, answers))
    return lambda case: count_prompt_tokens(case, material.template, reader) <= room
