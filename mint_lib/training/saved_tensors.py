"""What a decoder layer keeps for the backward pass: bytes for each place, counted tensor by tensor.

Goes in: an `Architecture` and a `Setting`. Comes out: bytes. Tensors that share memory are counted once, as PyTorch
holds them once. It counts the layers of Llama's kind in transformers, with PEFT's adapters, under autocast or without.
"""

from mint_lib.training.architecture import Architecture
from mint_lib.training.estimate_setting import Setting, TrainedParts


def count_layer_bytes(student: Architecture, setting: Setting, trained: TrainedParts) -> float:
    """Bytes for each place that one decoder layer keeps for the backward pass."""
    is_full, width = setting.tuning == "full", setting.width
    norms = sum(4 * size * (2 if is_full else 1) + 4 for size in student.norm_widths)
    repeated = setting.attention == "sdpa" and student.key_value < student.query
    key_value = student.query if repeated else student.key_value
    attention = width * (2 * student.query + 2 * key_value) + 4 * student.num_heads
    if setting.attention == "sdpa":  # the mask becomes numbers to add to the scores, in every layer anew
        attention += width * setting.row_tokens
    gate = 3 * width * student.feed_forward
    return norms + attention + gate + _count_input_bytes(student, setting, trained)


def _count_input_bytes(student: Architecture, setting: Setting, trained: TrainedParts) -> float:
    """Bytes for each place of what trained matrices of a decoder layer read, beyond attention's output."""
    sizes = {
        "q_proj": student.hidden,
        "k_proj": student.hidden,
        "v_proj": student.hidden,
        "o_proj": student.query,
        "gate_proj": student.hidden,
        "up_proj": student.hidden,
        "down_proj": student.feed_forward,
    }
    width = setting.width
    if setting.tuning == "full":
        normalised = 5 if setting.is_mixed else 2  # autocast casts a norm's float32 output for each matrix by itself
        return width * (normalised * student.hidden + student.feed_forward)
    names = {layer.name for layer in trained.adapted if layer.part == "language"}
    per_output = {layer.name: layer.num_outputs for layer in trained.adapted if layer.part == "language"}
    saved = len(names) * setting.lora.rank * width
    if setting.lora.update == "weight_decomposed":
        saved += 2 * width * sum(per_output.values())
    if setting.lora.dropout:
        mask = 1 if setting.device == "cuda" else 4
        return saved + sum(sizes[name] for name in names) * (width + mask)
    if setting.is_mixed and setting.quantisation == "none":  # PEFT casts to float32 and autocast back, for each matrix
        return saved + width * sum(sizes[name] for name in names)
    groups = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    return saved + width * sum(sizes[min(group)] for group in groups if group & names)


def count_first_layer_saving(student: Architecture, setting: Setting) -> int:
    """Bytes for each place that the first layer saves: what it reads needs no gradient, so its norm keeps nothing."""
    return 0 if setting.tuning == "full" or setting.trains_vision else 4 * student.hidden + 4
