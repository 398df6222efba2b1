"""Preparing preference rows: our prompt trees against the dataset maps that TRL's ORPOTrainer runs before it trains.

Goes in: preference pairs and a tokenizer. Comes out: for each side a function that prepares them, and one that reads
the token ids of what was prepared. Ours applies the chat template, tokenises, writes the file of trees and packs every
tree from it. TRL's side is given the prompts with the template already applied, since it would end an answer by another
token than the template does.
"""

import pathlib
import random
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from mint_lib.reading import TextReader
from mint_lib.records import PreferencePair, Turn

WINDOW_TOKENS = 1024
PROMPT_WORDS, NAMES_PER_ANSWER = 300, 3
_TEXT = (
    "short stature seizures hypotonia microcephaly cleft palate delayed speech hearing loss of the left ear and wide "
    "spaced eyes with broad nasal bridge ventricular septal defect recurrent infections scoliosis joint laxity feeding "
    "difficulties intellectual disability in a girl aged 4 whose brother died early; cataract, ptosis, café-au-lait "
    "spots, arachnodactyly"
)
_NAMES = ("Noonan syndrome 1", "Kabuki syndrome 2", "Marfan syndrome", "Sotos syndrome", "Rett syndrome", "Costello")

Ids = list[tuple[list[int], list[int], list[int]]]
"""Prompt, chosen and rejected answer of each row."""


class Preparation(NamedTuple):
    """One side."""

    prepare: Callable[[], Any]
    read_ids: Callable[[Any], Ids]
    """From what `prepare` returned."""


def draw_pairs(num_pairs: int) -> list[PreferencePair]:
    """Pairs of about 490 tokens, each with a prompt of its own: nothing is saved by sharing prompts."""
    draw, words = random.Random(1), _TEXT.split()

    def answer() -> str:
        return "POTENTIAL_DISEASES:\n" + "\n".join(
            f"{place}. '{name}'" for place, name in enumerate(draw.sample(_NAMES, NAMES_PER_ANSWER), start=1)
        )

    pairs = []
    for number in range(num_pairs):
        text = " ".join(draw.choice(words) for _ in range(PROMPT_WORDS))
        chosen, rejected = answer(), answer()
        while rejected == chosen:
            rejected = answer()
        pairs.append(
            PreferencePair(
                case_id=f"case-{number}",
                prompt=(Turn(role="user", content=f"Name the disease. {text}"),),
                chosen=chosen,
                rejected=rejected,
                chosen_label_ids=("A:1",),
                rejected_label_ids=("A:2",),
                teacher_digest="sha256:0",
                template_digest="sha256:0",
                policy="test",
            )
        )
    return pairs


def make_ours(pairs: list[PreferencePair], tokenizer: Any, folder: pathlib.Path) -> Preparation:
    """Our preparation; its file is written anew in each call."""
    from mint_lib.training.tree_file import write_trees

    def prepare() -> Any:
        trees = write_trees(
            iter(pairs),
            folder / "trees.arrow",
            reader=TextReader(tokenizer),
            window_tokens=WINDOW_TOKENS,
            with_prompt_edges=True,
        )
        return [trees[index] for index in range(len(trees))]

    def read_ids(items: Any) -> Ids:
        rows = []
        for item in items:
            prompt = list(item.tree.input_ids[: len(item.tree.prompt_path) + 1])
            answers = [[item.tree.targets[edge] for edge in path] for path in item.tree.paths]
            rows.append((prompt, answers[item.chosen[0]], answers[item.rejected[0]]))
        return rows

    return Preparation(prepare, read_ids)


def make_trl(pairs: list[PreferencePair], tokenizer: Any) -> Preparation:
    """TRL's three maps."""
    import datasets
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt
    from trl.experimental.orpo import ORPOTrainer

    datasets.disable_progress_bars()
    datasets.disable_caching()
    trainer = types.SimpleNamespace(is_encoder_decoder=False, processing_class=tokenizer, max_length=WINDOW_TOKENS)
    for name in ("build_tokenized_answer", "tokenize_row"):
        setattr(trainer, name, types.MethodType(getattr(ORPOTrainer, name), trainer))
    texts = datasets.Dataset.from_list(
        [
            {
                "prompt": tokenizer.apply_chat_template(
                    [turn.model_dump() for turn in pair.prompt], add_generation_prompt=True, tokenize=False
                ),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }
            for pair in pairs
        ]
    )

    def prepare() -> Any:
        rows = texts.map(maybe_extract_prompt)
        rows = rows.map(maybe_apply_chat_template, fn_kwargs={"processing_class": tokenizer})
        return rows.map(trainer.tokenize_row)

    def read_ids(rows: Any) -> Ids:
        columns = (rows["prompt_input_ids"], rows["chosen_input_ids"], rows["rejected_input_ids"])
        return [
            (prompt, chosen[len(prompt) :], rejected[len(prompt) :])
            for prompt, chosen, rejected in zip(*columns, strict=True)
        ]

    return Preparation(prepare, read_ids)
