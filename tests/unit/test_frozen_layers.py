"""Frozen layers: what is kept stands in for the row it was computed from, and for no other."""

import copy

import pytest
import torch

from mint_lib.packing import collate_trees, pack_tree, predict_edges
from mint_lib.student import StudentConfig, load_student
from mint_lib.training.frozen_layers import FrozenLayers

PAD = 0


@pytest.fixture(params=["sdpa", "eager"])
def student(request):
    """A student in training mode, and a list that grows whenever its first layer runs."""
    model = load_student(StudentConfig(model="tiny")).train()
    model.set_attn_implementation(request.param)
    runs = []
    model.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    return model, runs


def keep(model, batches):
    FrozenLayers(model.get_decoder(), num_frozen=1, pad_token_id=PAD).fill(batches)


@pytest.mark.parametrize("kept_in_one_row", [False, True])
@pytest.mark.parametrize("one_row", [False, True])
def test_frozen_layers_kept_trees_give_the_same_numbers_in_other_batches(student, kept_in_one_row, one_row):
    model, runs = student
    fresh = copy.deepcopy(model)
    # The padding token is a token like others where it is one of a tree.
    trees = [pack_tree([5, 6, 7], [[10, 11, 12], [20, 21]]), pack_tree([8], [[9, PAD, 3]]), pack_tree([4], [[2]])]
    kept = [collate_trees(group, pad_token_id=PAD, one_row=kept_in_one_row) for group in (trees[:1], trees[1:])]
    keep(model, kept)
    runs.clear()
    batch = collate_trees(trees[::-1], pad_token_id=PAD, one_row=one_row)
    # The same float32 operations in a batch of another shape.
    torch.testing.assert_close(predict_edges(model, batch), predict_edges(fresh, batch), atol=1e-5, rtol=0.0)
    assert len(runs) == 1, "only the copy, which keeps nothing, runs its first layer"


def test_frozen_layers_tree_of_the_same_tokens_in_another_shape_is_not_taken(student):
    model, runs = student
    chain, fork = pack_tree([5, 6], [[7, 8, 9]]), pack_tree([5, 6], [[7, 1], [8, 9]])
    assert chain.input_ids == fork.input_ids
    keep(model, [collate_trees([chain], pad_token_id=PAD)])
    runs.clear()
    predict_edges(model, collate_trees([fork], pad_token_id=PAD))
    assert runs
