"""Preference pairs as packed prompt trees: all pairs of one case hang from one prompt.

Goes in: pairs and the student's tokenizer. Comes out: trees, batches with the indices a preference loss needs, and the
average log-probabilities of both sides of each pair. It does not know what a method makes of them.

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
from mint_lib.reading import check_window, encode_answer, encode_prompt
from mint_lib.records import PreferencePair

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class PairTree:
    """The pairs of one prompt."""

    case_id: str
    tree: Tree
    chosen: tuple[int, ...]
    """For each pair, which of the tree's answers is chosen."""
    rejected: tuple[int, ...]


class PackedPairs(PackedTrees):
    """A batch of pair trees as tensors."""

    chosen_P: "torch.Tensor"  # noqa: N815
    """The answer, among the batch's A, that is each pair's chosen one."""
    rejected_P: "torch.Tensor"  # noqa: N815
    nll_weight_N: "torch.Tensor"  # noqa: N815
    """How many pairs count an edge in the likelihood of their chosen side: 0 for edges of rejected answers only."""
    case_ids: list[str]


def grow_trees(
    pairs: Sequence[PreferencePair],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    window_tokens: int,
    with_prompt_edges: bool = False,
) -> list[PairTree]:
    """One tree for each prompt of each case, in the order of first appearance; equal answers are stored once.

    Raises:
        PromptTooLong: prompt and answer of a pair together exceed `window_tokens`.
    """
    grouped: dict[tuple[str, tuple[object, ...]], list[PreferencePair]] = {}
    for pair in pairs:
        grouped.setdefault((pair.case_id, pair.prompt), []).append(pair)
    trees = []
    for (case_id, _), members in grouped.items():
        texts = list(dict.fromkeys(text for pair in members for text in (pair.chosen, pair.rejected)))
        prompt_ids = encode_prompt(tokenizer, members[0].prompt)
        answers = [encode_answer(tokenizer, text) for text in texts]
        num_tokens = len(prompt_ids) + max(map(len, answers))
        check_window(num_tokens, window_tokens=window_tokens, case_id=case_id)
        trees.append(
            PairTree(
                case_id=case_id,
                tree=pack_tree(prompt_ids, answers, with_prompt_edges=with_prompt_edges),
                chosen=tuple(texts.index(pair.chosen) for pair in members),
                rejected=tuple(texts.index(pair.rejected) for pair in members),
            )
        )
    return trees


def collate_pairs(trees: Sequence[PairTree], *, pad_token_id: int) -> PackedPairs:
    """A batch of `trees`, padded to the longest row."""
    import torch

    batch = collate_trees([item.tree for item in trees], pad_token_id=pad_token_id)
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
        "case_ids": [item.case_id for item in trees],
    }


def average_pairs(log_probability_N: "torch.Tensor", batch: PackedPairs) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Average log-probability of a token of the chosen and of the rejected answer, [P] each."""
    average_A = sum_answers(log_probability_N, batch) / batch["length_A"]
    return average_A[batch["chosen_P"]], average_A[batch["rejected_P"]]


def score_pairs(
    model: "PreTrainedModel", trees: Sequence[PairTree], *, pad_token_id: int, batch_tokens: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Average log-probabilities of both sides of all pairs, [P] each on the CPU, in the order of the trees."""
    import torch

    scored: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with torch.inference_mode():
        for group in group_by_length([len(item.tree.input_ids) for item in trees], max_tokens=batch_tokens):
            batch = move_to(collate_pairs([trees[index] for index in group], pad_token_id=pad_token_id), model.device)
            sides = average_pairs(predict_edges(model, batch), batch)
            counts = [len(trees[index].chosen) for index in group]
            split = zip(group, *(side.cpu().split(counts) for side in sides), strict=True)
            scored.update({index: (chosen_P, rejected_P) for index, chosen_P, rejected_P in split})
    ordered = [scored[index] for index in range(len(trees))]
    return torch.cat([chosen_P for chosen_P, _ in ordered]), torch.cat([rejected_P for _, rejected_P in ordered])
