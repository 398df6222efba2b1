"""Prompt trees as TRL's trainers take them: for each answer a padded row of its own, with the whole prompt in it.

Goes in: a file of prompt trees. Comes out: a TRL trainer on the same tokens, and the same images, as methods on prompt
trees train on. Its dataset only says which answers of which tree a row is made of; both lie on disk. It does not know
what the loss is.

Shape suffixes: B rows, T places.
"""

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mint_lib.packing import Tree, collate_trees, pack_tree
from mint_lib.reading import Reader
from mint_lib.training.preference_trees import PairTree
from mint_lib.training.setup import TrainingSetup
from mint_lib.training.tree_file import TreeFile

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers

_TREES_PER_BATCH = 1024  # of a record batch of the dataset's file
_OFF_UNLESS_ASKED_FOR = {"bf16": False, "gradient_checkpointing": False}  # TRL's configurations turn them on

ListRows = Callable[[PairTree], Iterable[Sequence[int]]]
"""The rows of a tree: the answers whose sequences one row of the dataset stands for."""
FinishBatch = Callable[[dict[str, Any]], dict[str, Any]]
"""From what `collate_rows` gives to what the trainer's loss takes."""


def build_row_trainer(
    trainer_class: type["transformers.Trainer"],
    config_class: Callable[..., "transformers.TrainingArguments"],
    model: "torch.nn.Module",
    *,
    trees: TreeFile,
    reader: Reader,
    setup: TrainingSetup,
    list_rows: ListRows,
    finish_batch: FinishBatch = dict,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> "transformers.Trainer":
    """A trainer of TRL's `trainer_class`; `settings` are of its `config_class`, `options` of its constructor."""
    kept = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    arguments = {**_OFF_UNLESS_ASKED_FOR, **setup.arguments, **(settings or {})}
    arguments |= {"max_length": None, "remove_unused_columns": False}  # nothing is cut or dropped
    trainer = _take_rows(trainer_class)(
        model=model,
        args=config_class(**arguments),
        train_dataset=write_rows(trees, setup.scratch / "rows.arrow", list_rows=list_rows),
        data_collator=lambda rows: finish_batch(collate_rows(rows, trees=trees, reader=reader)),
        processing_class=reader.tokenizer,
        **options,
    )
    # On a quantised base TRL rounds the trained weights to bfloat16, whose steps swallow small updates.
    for name, data in kept.items():
        parameter = model.get_parameter(name)
        if parameter.dtype != data.dtype:
            parameter.data = data.to(parameter.device)
    return trainer


def write_rows(trees: TreeFile, path: pathlib.Path, *, list_rows: ListRows) -> "datasets.Dataset":
    """The rows of all `trees`, each with the index `tree` and its `answers`, as a memory-mapped Arrow stream at `path`.

    TRL takes no dataset but one of `datasets`, and images only in a column that it would read in its own way.
    """
    import datasets
    import pyarrow

    schema = pyarrow.schema([("tree", pyarrow.int64()), ("answers", pyarrow.list_(pyarrow.int32()))])
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:
        for start in range(0, len(trees), _TREES_PER_BATCH):
            indices = range(start, min(start + _TREES_PER_BATCH, len(trees)))
            rows = [{"tree": i, "answers": list(answers)} for i in indices for answers in list_rows(trees[i])]
            stream.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema=schema))
    return datasets.Dataset.from_file(str(path))


def collate_rows(rows: Sequence[Mapping[str, Any]], *, trees: TreeFile, reader: Reader) -> dict[str, Any]:
    """A batch of all rows' first answers, then all their second ones, and so on, padded at the end to the longest.

    Returns:
        `input_ids`, `attention_mask` and `completion_mask` (1 at an answer's tokens), [B, T] integers each; what the
        model takes of the images, which each answer's sequence has for itself; and the `case_ids` of `rows`.
    """
    import torch

    members = [trees[row["tree"]] for row in rows]
    num_sides = len(rows[0]["answers"])
    sequences = [
        unpack_answer(member.tree, row["answers"][side])
        for side in range(num_sides)
        for row, member in zip(rows, members, strict=True)
    ]
    # A whole sequence as a tree without branches: its one answer is only predicted and takes no place.
    chains = [pack_tree([*prompt_ids, *answer_ids], [[0]]) for prompt_ids, answer_ids in sequences]
    batch = collate_trees(chains, pad_token_id=reader.tokenizer.pad_token_id)
    image_inputs = [reader.read_images(member.images, case_id=member.case_id) for member in members]
    place_T = torch.arange(batch["input_ids"].shape[1])
    is_token_BT = place_T < torch.tensor([len(chain.input_ids) for chain in chains])[:, None]
    is_answer_BT = is_token_BT & (place_T >= torch.tensor([len(prompt_ids) for prompt_ids, _ in sequences])[:, None])
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": is_token_BT.long(),
        "completion_mask": is_answer_BT.long(),
        **reader.collate_images(image_inputs * num_sides, chains, batch),
        "case_ids": [member.case_id for member in members],
    }


def unpack_answer(tree: Tree, answer: int) -> tuple[Sequence[int], Sequence[int]]:
    """Token ids of the prompt and of one answer of `tree`."""
    path = tree.paths[answer]
    num_prompt_tokens = tree.sources[path[0]] + 1
    return tree.input_ids[:num_prompt_tokens], [tree.targets[edge] for edge in path]


def _take_rows(trainer_class: Any) -> Any:
    """`trainer_class` of TRL, taking rows and batches as they are."""

    class RowTrainer(trainer_class):
        """Does not tokenise again, keeps case ids from the model, and tells nobody that it runs."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None:
            pass

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            inputs = {name: value for name, value in inputs.items() if name != "case_ids"}
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return RowTrainer
