"""Prompt trees: a prompt and all answers that hang from it, laid out so that one forward pass computes each token once.

Goes in: token ids of prompts and answers. Comes out: padded tensors with restarted positions and a 4-D mask, and the
log-probabilities of the answers' tokens. Answers that begin alike share their beginning, as in a trie. A tree is never
cut. This module knows neither preferences nor losses.

A token is predicted from the token before it; such a step is an edge. An answer is a path of edges. The last token of
an answer is predicted but never read, so it takes no place in the row.

Shape suffixes: B trees in a batch, T places in a row, N edges, L edges of all paths one after another, A answers,
H hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch

_CHUNK_TOKENS = 256
"""Edges that go through the output layer at a time: 50 MB of float32 logits for 49,152 tokens. Measured on one CPU
thread with 768 edges of SmolLM2-135M's shape, CPU time per edge is 1.21 times that of 768 at 64, 1.05 at 256."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt with its answers, as places and edges."""

    input_ids: tuple[int, ...]
    """Token at each place: the prompt, then the shared and own tokens of the answers."""
    parents: tuple[int, ...]
    """The place that each place follows; -1 for the first."""
    sources: tuple[int, ...]
    """The place whose hidden state predicts an edge's token."""
    targets: tuple[int, ...]
    """The token that an edge predicts."""
    prompt_path: tuple[int, ...]
    """Edges inside the prompt; empty unless they were asked for."""
    paths: tuple[tuple[int, ...], ...]
    """Edges of each answer, first to last."""


class PackedTrees(TypedDict):
    """A batch of trees as tensors."""

    input_ids: "torch.Tensor"
    """[B, T]"""
    position_ids: "torch.Tensor"
    """[B, T]; an answer's first token has the position after the prompt's last."""
    attention_mask: "torch.Tensor"
    """[B, 1, T, T] boolean: which places a place sees (the prompt, its own answer so far, itself)."""
    source_N: "torch.Tensor"
    """Place of each edge's source in the flattened [B * T]."""
    target_N: "torch.Tensor"
    edge_L: "torch.Tensor"
    answer_L: "torch.Tensor"
    """The answer that each entry of `edge_L` belongs to; answers are counted through the batch."""
    length_A: "torch.Tensor"
    """Number of tokens of each answer."""
    num_real_tokens: "torch.Tensor"
    """Scalar: places that are not padding."""


def pack_tree(prompt_ids: Sequence[int], answers: Sequence[Sequence[int]], *, with_prompt_edges: bool = False) -> Tree:
    """Lay out one prompt with its answers.

    Raises:
        ValueError: the prompt or an answer has no token.
    """
    if not prompt_ids or any(not answer for answer in answers):
        raise ValueError("a tree needs a prompt and answers of at least one token each")
    input_ids, parents = list(prompt_ids), list(range(-1, len(prompt_ids) - 1))
    sources: list[int] = []
    targets: list[int] = []
    if with_prompt_edges:
        sources, targets = list(range(len(prompt_ids) - 1)), list(prompt_ids[1:])
    num_prompt_edges = len(sources)
    edge_of: dict[tuple[int, int], int] = {}
    place_of_edge: dict[int, int] = {}
    paths = []
    for answer in answers:
        place, path = len(prompt_ids) - 1, []
        for depth, token in enumerate(answer):
            edge = edge_of.setdefault((place, token), len(sources))
            if edge == len(sources):
                sources.append(place)
                targets.append(token)
            path.append(edge)
            if depth == len(answer) - 1:
                break
            if edge not in place_of_edge:
                place_of_edge[edge] = len(input_ids)
                input_ids.append(token)
                parents.append(place)
            place = place_of_edge[edge]
        paths.append(tuple(path))
    return Tree(
        input_ids=tuple(input_ids),
        parents=tuple(parents),
        sources=tuple(sources),
        targets=tuple(targets),
        prompt_path=tuple(range(num_prompt_edges)),
        paths=tuple(paths),
    )


def collate_trees(trees: Sequence[Tree], *, pad_token_id: int) -> PackedTrees:
    """Pad `trees` to the longest row. Padding sees only itself, so no row of the mask is empty."""
    import torch

    num_places = max(len(tree.input_ids) for tree in trees)
    input_ids_BT = torch.full((len(trees), num_places), pad_token_id)
    position_ids_BT = torch.zeros_like(input_ids_BT)
    mask_BTT = torch.eye(num_places, dtype=torch.bool).repeat(len(trees), 1, 1)
    source_N: list[int] = []
    target_N: list[int] = []
    edge_L: list[int] = []
    answer_L: list[int] = []
    length_A: list[int] = []
    for row, tree in enumerate(trees):
        input_ids_BT[row, : len(tree.input_ids)] = torch.tensor(tree.input_ids)
        depths: list[int] = []
        for place, parent in enumerate(tree.parents):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            if parent >= 0:
                mask_BTT[row, place] |= mask_BTT[row, parent]
        position_ids_BT[row, : len(depths)] = torch.tensor(depths)
        first_edge = len(source_N)
        source_N += [row * num_places + source for source in tree.sources]
        target_N += tree.targets
        for path in tree.paths:
            edge_L += [first_edge + edge for edge in path]
            answer_L += [len(length_A)] * len(path)
            length_A.append(len(path))
    return {
        "input_ids": input_ids_BT,
        "position_ids": position_ids_BT,
        "attention_mask": mask_BTT[:, None],
        "source_N": torch.tensor(source_N),
        "target_N": torch.tensor(target_N),
        "edge_L": torch.tensor(edge_L),
        "answer_L": torch.tensor(answer_L),
        "length_A": torch.tensor(length_A),
        "num_real_tokens": torch.tensor(sum(len(tree.input_ids) for tree in trees)),
    }


def move_to(batch: Any, device: "torch.device") -> Any:
    """`batch` with its tensors on `device`."""
    return {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def predict_edges(model: Any, batch: PackedTrees) -> "torch.Tensor":
    """Float32 log-probability of each edge's token, [N], by one forward pass.

    The hidden states are gathered just before the output layer and go through it in chunks, so logits over the
    vocabulary exist for a part of the N edges at a time and never for every place. `model` may be wrapped (PEFT, data
    parallel, DeepSpeed).
    """
    from mint_lib.linear_head import predict_by_forward

    inner = model
    while not hasattr(inner, "get_output_embeddings"):
        inner = inner.module
    return predict_by_forward(
        inner,
        lambda: model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=False,
        ),
        source_N=batch["source_N"],
        target_N=batch["target_N"],
        chunk_tokens=_CHUNK_TOKENS,
    )


def sum_answers(log_probability_N: "torch.Tensor", batch: PackedTrees) -> "torch.Tensor":
    """Log-probability of each whole answer, [A]."""
    zeros_A = log_probability_N.new_zeros(len(batch["length_A"]))
    return zeros_A.index_add(0, batch["answer_L"], log_probability_N[batch["edge_L"]])


def group_by_length(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Indices in groups of similar length, longest first; a group padded to its longest has at most `max_tokens`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
