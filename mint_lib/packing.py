"""Prompt trees: a prompt and all answers that hang from it, laid out so that one forward pass computes each token once.

Goes in: token ids of prompts and answers. Comes out: tensors with restarted positions, and the log-probabilities of the
answers' tokens. Answers that begin alike share their beginning, as in a trie. A tree is never cut. A row holds one tree
and padding, or all trees of a batch. This module knows neither preferences nor losses.

A token is predicted from the token before it; such a step is an edge. An answer is a path of edges. The last token of
an answer is predicted but never read, so it takes no place in the row.

Shape suffixes: B rows in a batch, T places in a row, N edges, L edges of all paths one after another, A answers,
H hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

if TYPE_CHECKING:
    import torch

_CHUNK_TOKENS = 256
"""Edges that go through the output layer at a time: 50 MB of float32 logits for 49,152 tokens. Measured on one CPU
thread with 768 edges of SmolLM2-135M's shape, CPU time per edge is 1.21 times that of 768 at 64, 1.05 at 256."""


@dataclasses.dataclass(frozen=True)
class Tree:
    """One prompt with its answers, as places and edges. Places stand in depth-first order, the prompt first."""

    input_ids: tuple[int, ...]
    """Token at each place: the prompt, then the shared and own tokens of the answers."""
    positions: tuple[int, ...]
    """Number of places before each place on its own path."""
    ends: tuple[int, ...]
    """For each place, the first place after its subtree: place q sees place k if and only if k <= q < ends[k]."""
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
    end_BT: "torch.Tensor"
    """[B, T]; a place q of a row sees its place k if and only if k <= q < end of k. Padding sees only itself."""
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
    image_inputs: NotRequired[dict[str, Any]]
    """What the model takes beside tokens, by argument; `position_ids` here take the place of the batch's own."""


def pack_tree(
    prompt_ids: Sequence[int],
    answers: Sequence[Sequence[int]],
    *,
    with_prompt_edges: bool = False,
    unpredicted_ids: Collection[int] = frozenset(),
) -> Tree:
    """Lay out one prompt with its answers; edges are numbered by first appearance.

    `with_prompt_edges` predicts the prompt's tokens too, other than `unpredicted_ids`.

    Raises:
        ValueError: the prompt or an answer has no token.
    """
    if not prompt_ids or any(not answer for answer in answers):
        raise ValueError("a tree needs a prompt and answers of at least one token each")
    num_prompt_places = len(prompt_ids)
    sources = list(range(num_prompt_places - 1)) if with_prompt_edges else []
    if unpredicted_ids:
        sources = [place for place in sources if prompt_ids[place + 1] not in unpredicted_ids]
    targets = [prompt_ids[place + 1] for place in sources]
    num_prompt_edges = len(targets)
    paths = _number_edges(answers, targets)
    input_ids, positions = list(prompt_ids), list(range(num_prompt_places))
    ends = [0] * num_prompt_places
    sources += [0] * (len(targets) - num_prompt_edges)  # each answer sets its own
    place_of: dict[int, int] = {}
    for path in sorted(set(paths)):  # siblings by first appearance, each followed by its subtree
        source = num_prompt_places - 1
        for edge in path[:-1]:  # the last token is only predicted
            sources[edge] = source
            source = place_of.setdefault(edge, len(input_ids))
            if source == len(input_ids):
                input_ids.append(targets[edge])
                positions.append(positions[sources[edge]] + 1)
                ends.append(0)
        sources[path[-1]] = source
        for edge in path[:-1]:  # the last path through a place ends its subtree
            ends[place_of[edge]] = len(input_ids)
    ends[:num_prompt_places] = [len(input_ids)] * num_prompt_places
    return Tree(
        input_ids=tuple(input_ids),
        positions=tuple(positions),
        ends=tuple(ends),
        sources=tuple(sources),
        targets=tuple(targets),
        prompt_path=tuple(range(num_prompt_edges)),
        paths=tuple(paths),
    )


def _number_edges(answers: Sequence[Sequence[int]], targets: list[int]) -> list[tuple[int, ...]]:
    """The path of each answer; the token of each new edge is added to `targets`."""
    edge_of: dict[tuple[int, int], int] = {}
    paths = []
    for answer in answers:
        edge, path = -1, []
        for token in answer:
            edge = edge_of.setdefault((edge, token), len(targets))
            if edge == len(targets):
                targets.append(token)
            path.append(edge)
        paths.append(tuple(path))
    return paths


def collate_trees(trees: Sequence[Tree], *, pad_token_id: int, one_row: bool = False) -> PackedTrees:
    """Rows of one tree each, padded to the longest; with `one_row`, all trees behind one another without padding."""
    import torch

    lengths = [len(tree.input_ids) for tree in trees]
    width = sum(lengths) if one_row else max(lengths)
    input_ids: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    edges: list[int] = []
    for tree, length in zip(trees, lengths, strict=True):
        first_place, first_edge = len(input_ids), len(targets)
        start = first_place if one_row else 0
        input_ids += tree.input_ids
        positions += tree.positions
        ends += [start + end for end in tree.ends]
        if not one_row:
            input_ids += [pad_token_id] * (width - length)
            positions += [0] * (width - length)
            ends += range(length + 1, width + 1)
        sources += [first_place + source for source in tree.sources]
        targets += tree.targets
        edges += [first_edge + edge for path in tree.paths for edge in path]
    length_A = _to_tensor([len(path) for tree in trees for path in tree.paths])
    return {
        "input_ids": _to_tensor(input_ids).view(-1, width),
        "position_ids": _to_tensor(positions).view(-1, width),
        "end_BT": _to_tensor(ends).view(-1, width),
        "source_N": _to_tensor(sources),
        "target_N": _to_tensor(targets),
        "edge_L": _to_tensor(edges),
        "answer_L": torch.arange(len(length_A)).repeat_interleave(length_A),
        "length_A": length_A,
        "num_real_tokens": torch.tensor(sum(lengths)),
    }


def _to_tensor(values: list[int]) -> "torch.Tensor":
    """`torch.tensor(values)`, which takes six times as long: 390 against 63 microseconds for 3,200 tokens."""
    import numpy
    import torch

    return torch.from_numpy(numpy.array(values, dtype=numpy.int64))


def move_to(batch: Any, device: "torch.device") -> Any:
    """`batch` with its tensors on `device`, those of dictionaries inside it too."""
    if isinstance(batch, Mapping):
        return {key: move_to(value, device) for key, value in batch.items()}
    return batch.to(device) if hasattr(batch, "to") else batch


def predict_edges(model: Any, batch: PackedTrees) -> "torch.Tensor":
    """Float32 log-probability of each edge's token, [N], by one forward pass.

    The hidden states are gathered just before the output layer and go through it in chunks, so logits over the
    vocabulary exist for a part of the N edges at a time and never for every place. `model` may be wrapped (PEFT, data
    parallel, DeepSpeed); its attention may be `sdpa`, `eager` or `flex_attention`.
    """
    from mint_lib.attention import make_attention_mask
    from mint_lib.linear_head import predict_by_forward

    inner = model
    # DeepSpeed's engine answers for the model inside, but its config is its own dictionary.
    while not hasattr(inner, "get_output_embeddings") or isinstance(inner.config, dict):
        inner = inner.module
    implementation = inner.config.get_text_config()._attn_implementation
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "attention_mask": make_attention_mask(batch["end_BT"], implementation=implementation, dtype=inner.dtype),
        **batch.get("image_inputs", {}),
    }
    return predict_by_forward(
        inner,
        lambda: model(**inputs, use_cache=False),
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
