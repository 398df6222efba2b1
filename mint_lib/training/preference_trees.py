"""Preference pairs as packed prompt trees: all pairs of one case hang from one prompt.

Goes in: pairs and the student's reader. Comes out: trees, batches with the indices a preference loss needs, and the
average log-probabilities of both sides of each pair; and prompts cut to the room they have. It does not know what a
method makes of them, nor where the trees of a training set lie.

Shape suffixes: as in `mint_lib/packing.py`, and P pairs in a batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mint_lib.packing import (
    PackedTrees,
    Tree,
    collate_trees,
    group_by_length,
    move_to,
    pack_tree,
    predict_edges,
    sum_answers,
)
from mint_lib.reading import OverLong, Reader, encode_answer, fit_prompt
from mint_lib.records import PreferencePair

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True)
class PairTree:
    """The pairs of one prompt."""

    case_id: str
    tree: Tree
    chosen: tuple[int, ...]
    """For each pair, which of the tree's answers is chosen."""
    rejected: tuple[int, ...]
    images: tuple[bytes, ...] = dataclasses.field(default=(), repr=False)
    """The prompt's encoded images; their places are in the tree."""


class PackedPairs(PackedTrees):
    """A batch of pair trees as tensors."""

    chosen_P: "torch.Tensor"  # noqa: N815
    """The answer, among the batch's A, that is each pair's chosen one."""
    rejected_P: "torch.Tensor"  # noqa: N815
    nll_weight_N: "torch.Tensor"  # noqa: N815
    """How many pairs count an edge in the likelihood of their chosen side: 0 for edges of rejected answers only."""
    pair_total: "torch.Tensor"
    """Scalar that a loss divides its sum over pairs by: their number, in this batch or in all of an optimiser step."""
    nll_total: "torch.Tensor"
    """Scalar that a loss divides its sum over edges by: the sum of `nll_weight_N`, of this batch or of a step."""
    case_ids: list[str]


def grow_trees(
    pairs: Sequence[PreferencePair],
    reader: Reader,
    *,
    window_tokens: int,
    with_prompt_edges: bool = False,
    over_long: OverLong = "refuse",
) -> list[PairTree]:
    """One tree for each prompt of each case, in the order of first appearance; equal answers are stored once.

    Raises:
        PromptTooLong: as `fit_prompt`.
        InvalidInput: the reader refuses a prompt or its images.
    """
    grouped: dict[tuple[object, ...], list[PreferencePair]] = {}
    for pair in pairs:
        grouped.setdefault((pair.case_id, pair.prompt, pair.images), []).append(pair)
    trees = []
    for members in grouped.values():
        first = members[0]
        texts = list(dict.fromkeys(text for pair in members for text in (pair.chosen, pair.rejected)))
        answers = [encode_answer(reader.tokenizer, text) for text in texts]
        fitted = fit_prompt(
            reader,
            first.prompt,
            first.images,
            room_tokens=window_tokens - max(map(len, answers)),
            over_long=over_long,
            case_id=first.case_id,
        )
        trees.append(
            PairTree(
                case_id=first.case_id,
                tree=pack_tree(
                    fitted.read.ids,
                    answers,
                    with_prompt_edges=with_prompt_edges,
                    unpredicted_ids=reader.unpredicted_ids,
                ),
                chosen=tuple(texts.index(pair.chosen) for pair in members),
                rejected=tuple(texts.index(pair.rejected) for pair in members),
                images=first.images,
            )
        )
    return trees


def collate_pairs(
    trees: Sequence[PairTree], *, pad_token_id: int, reader: Reader | None = None, one_row: bool = False
) -> PackedPairs:
    """A batch of `trees`, padded to the longest row or, with `one_row`, behind one another in one.

    The totals are those of this batch. `reader` makes the model's inputs of the trees' images; without it there must
    be none.

    Raises:
        InvalidInput: the reader refuses an image.
    """
    import torch

    packed = [item.tree for item in trees]
    batch = collate_trees(packed, pad_token_id=pad_token_id, one_row=one_row)
    if reader is not None:
        image_inputs = [reader.read_images(item.images, case_id=item.case_id) for item in trees]
        if inputs := reader.collate_images(image_inputs, packed, batch):
            batch["image_inputs"] = inputs
    elif any(item.images for item in trees):
        raise ValueError("a batch with images needs the student's reader")
    chosen_P: list[int] = []
    rejected_P: list[int] = []
    nll_weight_N: list[float] = []
    first_answer = 0
    for item in trees:
        chosen_P += [first_answer + answer for answer in item.chosen]
        rejected_P += [first_answer + answer for answer in item.rejected]
        first_answer += len(item.tree.paths)
        weights = [0.0] * len(item.tree.sources)
        for answer in item.chosen:
            for edge in (*item.tree.prompt_path, *item.tree.paths[answer]):
                weights[edge] += 1.0
        nll_weight_N += weights
    return {
        **batch,
        "chosen_P": torch.tensor(chosen_P),
        "rejected_P": torch.tensor(rejected_P),
        "nll_weight_N": torch.tensor(nll_weight_N),
        "pair_total": torch.tensor(float(len(chosen_P))),
        "nll_total": torch.tensor(sum(nll_weight_N)),
        "case_ids": [item.case_id for item in trees],
    }


def average_pairs(log_probability_N: "torch.Tensor", batch: PackedPairs) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Average log-probability of a token of the chosen and of the rejected answer, [P] each."""
    average_A = sum_answers(log_probability_N, batch) / batch["length_A"]
    return average_A[batch["chosen_P"]], average_A[batch["rejected_P"]]


def score_pairs(
    model: "PreTrainedModel", trees: Sequence[PairTree], *, reader: Reader, batch_tokens: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Average log-probabilities of both sides of all pairs, [P] each on the CPU, in the order of the trees."""
    import torch

    pad_token_id = reader.tokenizer.pad_token_id
    scored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode():
        for group in group_by_length([len(item.tree.input_ids) for item in trees], max_tokens=batch_tokens):
            members = [trees[index] for index in group]
            batch = move_to(collate_pairs(members, pad_token_id=pad_token_id, reader=reader), model.device)
            sides = average_pairs(predict_edges(model, batch), batch)
            counts = [len(item.chosen) for item in members]
            split = zip(group, *(side.cpu().split(counts) for side in sides), strict=True)
            scored.update({index: (chosen_P, rejected_P) for index, chosen_P, rejected_P in split})
    ordered = [scored[index] for index in range(len(trees))]
    return torch.cat([chosen_P for chosen_P, _ in ordered]), torch.cat([rejected_P for _, rejected_P in ordered])
