"""What a run of alignment on prompt trees will need: memory of each worker's device, and time, before anything runs.

Goes in: the student's `Architecture` and a `Setting`. Comes out: bytes by cause, each with its formula in words, and
floating-point operations. The formulas count the tensors that the trainer's own code keeps; tests hold the counts
against PyTorch's saved tensors and PEFT's parameters. It knows no recipe and no device, and of fragmentation only one
stated share.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from mint_lib.training.architecture import Architecture
from mint_lib.training.estimate_setting import Setting, TrainedParts, count_trained
from mint_lib.training.saved_tensors import count_first_layer_saving, count_layer_bytes

CONTEXT_BYTES = 1_300_000_000
"""CUDA's context with the kernels of PyTorch: what Hugging Face's "Model training anatomy" measured (1,343 MB)."""
ALLOCATOR_SHARE = 0.1
"""Assumed share that PyTorch's allocator holds beyond the tensors of a pass, for their sizes change. Not measured."""
UTILISATION = 0.3
"""Assumed share of the peak FLOP/s that a run reaches; not measured. Llama 3's own training reached 0.38 to 0.43 with
code made for it (Grattafiori et al. 2024, arXiv 2407.21783, table 4)."""
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, 8 bits for each 64 and 32 bits for each 64 x 256 (QLoRA, arXiv 2305.14314, section 3)."""
_CHUNK_EDGES = 256
"""Edges that `predict_edges` takes through the output layer at a time."""


class Term(NamedTuple):
    """One cause of memory."""

    name: str
    num_bytes: float
    formula: str
    """How it is computed, in words."""


def estimate_memory(student: Architecture, setting: Setting) -> list[Term]:
    """Bytes on the device of one worker at the peak of a step, by cause."""
    trained = count_trained(student, setting)
    working = max(_working_bytes(student, setting), key=lambda term: term.num_bytes)
    of_pass = [*_activation_terms(student, setting, trained), working, *_image_terms(student, setting, trained)]
    terms = [*_weight_terms(student, setting, trained), *of_pass]
    if setting.device == "cuda":
        slack = ALLOCATOR_SHARE * sum(term.num_bytes for term in of_pass)
        terms.append(
            Term(
                "CUDA context and allocator",
                CONTEXT_BYTES + slack,
                f"{CONTEXT_BYTES / 1e9:g} GB (Hugging Face, Model training anatomy) + {ALLOCATOR_SHARE:.0%} of what a "
                "pass takes (assumed)",
            )
        )
    return [term for term in terms if term.num_bytes]


def find_largest_batch(student: Architecture, setting: Setting, *, memory_bytes: float) -> int | None:
    """The largest `batch_tokens`, a multiple of 128, whose estimate is at most `memory_bytes`.

    None if not even the longest tree alone fits.
    """

    def fits(num_tokens: int) -> bool:
        changed = dataclasses.replace(setting, batch_tokens=num_tokens)
        return sum(term.num_bytes for term in estimate_memory(student, changed)) <= memory_bytes

    least, most = -(-setting.row_tokens // 128), 2**16  # 8 million places are beyond any device
    if not fits(least * 128):
        return None
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle * 128) else (least, middle)
    return least * 128


def estimate_flops(student: Architecture, setting: Setting) -> float:
    """Floating-point operations of one optimiser step, of all workers together, padding left out.

    A matrix of n weights takes 2 n operations for each place forward, 2 n for the gradient of its inputs and, where it
    is trained, 2 n for its own (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    """
    trained = count_trained(student, setting)
    is_full = setting.tuning == "full"
    reached = (student.num_layers - trained.first_layer) / student.num_layers
    matrices = sum(layer.num_inputs * layer.num_outputs for layer in student.linear_layers if layer.part == "language")
    adapter = 0 if is_full else sum(setting.lora.rank * (x.num_inputs + x.num_outputs) for x in trained.adapted)
    seen = setting.mean_row_tokens / (2 if setting.attention == "flex" else 1)
    attention = 4 * seen * student.query * student.num_layers
    forward = 2 * (matrices + adapter) + attention
    # FlashAttention's backward pass has 5 matrix products to the forward's 2 (Dao 2023, arXiv 2307.08691).
    backward = reached * (2 * matrices * (2 if is_full else 1) + 2.5 * attention) + 4 * adapter
    again = reached * forward if setting.activations == "recompute" else 0.0
    head = setting.edge_share * student.vocabulary * student.hidden * (8 if is_full else 4)
    per_tree = setting.mean_row_tokens * (forward + backward + again + head)
    if student.tower:
        tower = sum(layer.num_inputs * layer.num_outputs for layer in student.linear_layers if layer.part != "language")
        is_reached = is_full or setting.lora.towers == "language_and_vision"
        per_tree += 2 * tower * _count_patches(student, setting, trees=1) * (3 if is_full else 2 if is_reached else 1)
    return setting.trees_per_batch * per_tree


def _weight_terms(student: Architecture, setting: Setting, trained: TrainedParts) -> Iterator[Term]:
    number, shards, stage = trained.num_parameters, setting.num_workers, setting.deepspeed_stage
    sharded = f", over {shards} workers" if shards > 1 else ""
    is_full = setting.tuning == "full"
    wide = 4 if stage is None or setting.dtype == "float32" else 2  # what is trained is kept in float32
    matrices = sum(layer.num_inputs * layer.num_outputs for layer in student.linear_layers if layer.part == "language")
    if not is_full:
        rest = student.num_parameters - matrices
        each = _NF4_BYTES if setting.quantisation == "nf4" else setting.width
        words = f"{student.num_parameters:,} frozen x {setting.width} bytes"
        if setting.quantisation == "nf4":
            words = f"{matrices:,} of the decoder x {each:.4f} bytes (nf4, double quantisation)"
            words += f" + {rest:,} x {setting.width}"
        yield from _share_weights("base weights", matrices * each + rest * setting.width, words, student, setting)
        yield Term("adapter", number * wide, f"{number:,} trained x {wide} bytes (float32 where autocast computes)")
    else:
        words = f"{number:,} trained x {wide} bytes"
        yield from _share_weights("trained weights", number * wide, words, student, setting)
    if setting.activations == "keep":
        yield _cast_weights(student, setting, number)
    on_host = setting.offload != "none"
    if stage is None:
        yield Term("gradients", 4 * number, f"{number:,} x 4 bytes")
        yield Term("optimiser", 8 * number, f"{number:,} x 2 moments of AdamW x 4 bytes")
        if shards > 1:
            yield Term("gradient buckets", 4 * number, "a copy of the gradients, which data parallelism reduces")
        return
    bucket = setting.bucket_elements
    yield Term(
        "gradient buckets", 2 * wide * bucket, f"DeepSpeed's reduce bucket and its copy, {bucket:,} x {wide} bytes"
    )
    if not on_host:
        yield Term("gradients", wide * number / shards, f"{number:,} x {wide} bytes{sharded}")
        yield Term("optimiser", 12 * number / shards, f"{number:,} x (2 moments + master weight) x 4 bytes{sharded}")


def _cast_weights(student: Architecture, setting: Setting, num_trained: int) -> Term:
    """Autocast's copies of trained weights: kept for the backward pass, or until it where layers are recomputed."""
    cast = sum(x.num_inputs * x.num_outputs for x in student.linear_layers) if setting.tuning == "full" else num_trained
    return Term("bfloat16 copies", 2 * cast if setting.is_mixed else 0, f"{cast:,} trained x 2 bytes, made by autocast")


def _share_weights(name: str, num_bytes: float, words: str, student: Architecture, setting: Setting) -> Iterator[Term]:
    """Weights whole, or DeepSpeed's third stage's part of them and the layers that are gathered for use."""
    if setting.deepspeed_stage != 3:
        yield Term(name, num_bytes, words)
        return
    if setting.offload != "optimizer_and_parameters":
        yield Term(name, num_bytes / setting.num_workers, f"{words}, over {setting.num_workers} workers")
    layer = num_bytes / student.num_layers
    table = student.vocabulary * student.hidden * setting.width
    yield Term("gathered weights", 2 * layer + table, "two decoder layers and the output layer, whole while in use")


def _activation_terms(student: Architecture, setting: Setting, trained: TrainedParts) -> Iterator[Term]:
    places, width = setting.num_places, setting.width
    num_layers = student.num_layers - trained.first_layer
    residual = 4 if setting.tuning == "full" and setting.is_mixed else width
    if setting.activations == "recompute":
        yield Term(
            "activations",
            places * num_layers * student.hidden * residual,
            f"{places:,} places x {num_layers} layers' inputs x {student.hidden} x {residual} bytes",
        )
    else:
        per_place = count_layer_bytes(student, setting, trained)
        yield Term(
            "activations",
            places * num_layers * per_place - places * count_first_layer_saving(student, setting),
            f"{places:,} places x {num_layers} layers x {per_place:,.0f} bytes: the inputs of norms, matrices, "
            "attention and activation that the backward pass reads",
        )
    edges = places * setting.edge_share
    last_norm = places * (student.hidden * 4 * (2 if setting.tuning == "full" else 1) + 4)
    kept = edges * student.hidden * width * (2 if setting.tuning == "full" else 1)
    rotary = 2 * places * student.head_size * residual
    words = f"last norm, rotary angles, and {edges:,.0f} predicted tokens x {student.hidden} x {width} bytes"
    yield Term("around the layers", last_norm + kept + rotary, words)
    if setting.cached_tokens:
        number = setting.cached_tokens * student.hidden * width
        yield Term("frozen layers' cache", number, f"{setting.cached_tokens:,} places of the training set, kept")


def _working_bytes(student: Architecture, setting: Setting) -> Iterator[Term]:
    """What exists only for a moment. The largest one counts, as they do not exist together."""
    places, width = setting.num_places, setting.width
    is_full = setting.tuning == "full"
    chunk = min(_CHUNK_EDGES, round(places * setting.edge_share) or 1)
    copies = 4 if width == 4 else 6
    words = f"{chunk} edges x {student.vocabulary:,} logits x {copies} bytes (float32"
    gradient = student.vocabulary * student.hidden * (4 + width) if is_full else 0
    words += " and bfloat16)" if width == 2 else ")"
    words += " and the gradient of its weight" if is_full else ""
    cast = _cast_weights(student, setting, count_trained(student, setting).num_parameters)
    is_held = setting.activations == "recompute" and bool(cast.num_bytes)
    words += f", and {cast.formula}" if is_held else ""
    at_head = chunk * student.vocabulary * copies + gradient + is_held * cast.num_bytes
    yield Term("output layer at work", at_head, words)
    layer: float = places * width * (3 * student.feed_forward + 2 * student.hidden)
    words = f"gradients in one decoder layer, {places:,} places x (3 x {student.feed_forward} + 2 x {student.hidden})"
    if setting.activations == "recompute":
        layer += places * count_layer_bytes(student, setting, count_trained(student, setting))
        words += ", and what it computes again"
    if setting.quantisation == "nf4":
        layer += width * max(x.num_inputs * x.num_outputs for x in student.linear_layers if x.part == "language")
        words += ", and one matrix of it unpacked"
    if setting.lora.update == "weight_decomposed" and not is_full:
        layer += width * max(x.num_inputs * (x.num_inputs + 2 * x.num_outputs) for x in student.linear_layers)
        words += ", and the product of one adapter, which PEFT makes whole to know its norm"
    yield Term("a layer at work", layer, words)


def _image_terms(student: Architecture, setting: Setting, trained: TrainedParts) -> Iterator[Term]:
    tower, width = student.tower, setting.width
    if tower is None or not setting.images_per_tree:
        return
    trees = max(1, round(setting.num_places / setting.mean_row_tokens))
    patches = _count_patches(student, setting, trees=trees)
    at_work = patches * width * (6 * tower.hidden + 2 * tower.feed_forward)
    words = f"{patches:,.0f} patches, one layer's values at a time (rough)"
    if setting.tuning == "full" or any(layer.part == "vision" for layer in trained.adapted):
        at_work = patches * width * tower.num_layers * (12 * tower.hidden + 4 * tower.feed_forward)
        words = f"{patches:,.0f} patches x {tower.num_layers} layers, kept for the backward pass (rough)"
    yield Term("vision tower", at_work, words)
    if student.num_cross_layers:
        copies = 2 * student.hidden + 2 * student.query
        seen = patches / trees * setting.num_places
        num_layers = 1 if setting.activations == "recompute" else student.num_cross_layers
        kept = width * (patches * student.hidden + num_layers * (patches * copies + seen))
        yield Term("image features", kept, f"{patches:,.0f} features, in {num_layers} layers at once, and their mask")


def _count_patches(student: Architecture, setting: Setting, *, trees: int) -> float:
    """At most: for families whose image tokens stand in the prompt, as if every place of it were an image's."""
    assert student.tower
    if student.tower.patches_per_place is None:
        return float(trees * setting.images_per_tree * student.tower.patches_per_image)
    return trees * setting.mean_row_tokens * student.tower.patches_per_place if setting.images_per_tree else 0.0
