"""A base's config.json, looked at before a model is made from it: only keys that its own classes in transformers have.

Goes in: the path of a config. Comes out: the config object, or the reason for refusing it. Plain decoders are taken,
and image students of known families, whose parts (language model and vision tower) are looked at alike. No code
of a model repository is ever run, and no weights are read.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mint_lib.server.safe_files import read_json_object, refuse

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""Decoders with plain attention that transformers itself implements; the engine serves no others."""


class ImageFamily(NamedTuple):
    """What an image student of one family may consist of."""

    language: tuple[str, ...]
    """`model_type` of its language model."""
    vision: tuple[str, ...]
    """`model_type` of its vision tower."""
    projector: str
    """Name of the module between them."""


IMAGE_FAMILIES: Mapping[str, ImageFamily] = {
    "idefics3": ImageFamily(FAMILIES, ("idefics3_vision", "idefics3"), "model.connector"),
    "llava": ImageFamily(
        FAMILIES, ("clip_vision_model", "siglip_vision_model", "efficientnet_lite"), "model.multi_modal_projector"
    ),
    "mllama": ImageFamily(("mllama_text_model",), ("mllama_vision_model",), "model.multi_modal_projector"),
    "qwen2_5_vl": ImageFamily(("qwen2_5_vl_text",), ("qwen2_5_vl_vision", "qwen2_5_vl"), "model.visual.merger"),
    "qwen2_vl": ImageFamily(("qwen2_vl_text",), ("qwen2_vl_vision", "qwen2_vl"), "model.visual.merger"),
    "smolvlm": ImageFamily(FAMILIES, ("smolvlm_vision",), "model.connector"),
}
_CONFIG_KEYS = frozenset(
    [
        "model_type",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "_model_name_or_path",
        "unk_token_id",
        "rope_theta",
        "rope_scaling",
        "is_llama_config",
        "rope_interleaved",
        "transformers.js_config",
    ]
)
"""Keys beside those of the config class that saved configs carry and that load nothing."""
_IMAGE_KEYS = frozenset(
    [
        "_pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "image_token_id",
        "tie_word_embeddings",
        "use_cache",
        "ignore_index",
        "vision_token_id",
        "max_image_size",
        "size",
        "pixel_shuffle_factor",
        "qk_layer_norms",
        "use_resampler",
        "use_base_siglip",
        "neftune_noise_alpha",
        "perceiver_config",
        "projection_dim",
        "vocab_size",
        "in_chans",
        "spatial_patch_size",
        # Settings of generation and of classifiers, which transformers 4 wrote into every part of a config.
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_scores",
        "prefix",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    ]
)
"""The same for image students and their parts."""
_DTYPES = ("float32", "float16", "bfloat16")
_MAX_NUMBER = 2**31
"""No size of a config is larger; it keeps a lying config from asking for absurd amounts of memory."""
_MAX_LAYERS = 512
_MAX_IMAGE_PIXELS = 4096
"""Longest side of what a vision tower reads."""


def check_config(path: pathlib.Path) -> Any:
    """The config object of the file `path`.

    Raises:
        InvalidInput: the family is not served; a key is unknown and could name code; a value is absurd, or one that its
            class does not accept; it attends within a sliding window.
    """
    found = read_json_object(path)
    family = found.get("model_type")
    if not isinstance(family, str) or family not in (*FAMILIES, *IMAGE_FAMILIES):
        refuse(path, f"its model_type is none of {', '.join((*FAMILIES, *IMAGE_FAMILIES))}")
    if family in IMAGE_FAMILIES:
        return _check_whole(found, path, IMAGE_FAMILIES[family])
    if "vision_config" in found:
        refuse(path, f"its model_type {family} reads text only, and it describes a vision tower")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config_class = CONFIG_MAPPING[family]
    _check_part(found, path, config_class, more=_CONFIG_KEYS)
    _check_architecture(found, path, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    config = _make(config_class, found, path)
    _check_attention(config, path)
    return config


def _check_whole(found: dict[str, Any], path: pathlib.Path, parts: ImageFamily) -> Any:
    """The config object of an image student."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    import mint_lib.vision.efficientnet_lite  # noqa: F401 - makes its architecture known to transformers

    family = found["model_type"]
    config_class = CONFIG_MAPPING[family]
    more = _CONFIG_KEYS | _IMAGE_KEYS
    allowed = {"text_config": parts.language, "vision_config": parts.vision}
    for name, model_types in allowed.items():
        part = found.get(name)
        if part is None and name == "text_config":  # older files have the language model's keys beside the others
            more |= _list_keys(CONFIG_MAPPING[model_types[0]])
            continue
        if not isinstance(part, dict):
            refuse(path, f"its {name} is missing or no object")
        kind = part.get("model_type", model_types[0])
        if not isinstance(kind, str) or kind not in model_types:
            refuse(path, f"the model_type of its {name} is none of {', '.join(model_types)}")
        part_class = config_class.sub_configs[name] if kind == family else CONFIG_MAPPING[kind]
        _check_part(part, path, part_class, more=_CONFIG_KEYS | _IMAGE_KEYS)
        size = part.get("image_size", 1)
        sides = size if isinstance(size, list) else [size]
        if not all(type(side) is int and 1 <= side <= _MAX_IMAGE_PIXELS for side in sides):
            refuse(path, f"its images are not 1 to {_MAX_IMAGE_PIXELS} pixels wide")
    _check_part({key: value for key, value in found.items() if key not in allowed}, path, config_class, more=more)
    _check_architecture(found, path, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family])
    config = _make(config_class, found, path)
    _check_attention(config.get_text_config(), path)
    return config


def _list_keys(config_class: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(config_class))


def _check_part(found: dict[str, Any], path: pathlib.Path, config_class: Any, *, more: frozenset[str]) -> None:
    """Refuse keys that neither `config_class` nor `more` has, and values that no model has."""
    if not found.keys() <= _list_keys(config_class) | more:
        refuse(path, f"it holds keys that {config_class.__name__} does not have, and could name code to run")
    if any((found.get(key) or "float32") not in _DTYPES for key in ("dtype", "torch_dtype")):
        refuse(path, f"its element type is none of {', '.join(_DTYPES)}")
    if not all(abs(number) <= _MAX_NUMBER for number in _list_numbers(found)):
        refuse(path, "it holds a number beyond all sizes of models")
    layers = found.get("num_hidden_layers")
    if layers is not None and not (type(layers) is int and 1 <= layers <= _MAX_LAYERS):
        refuse(path, f"its number of layers is not 1 to {_MAX_LAYERS}")


def _check_architecture(found: dict[str, Any], path: pathlib.Path, name: str) -> None:
    if found.get("architectures") not in (None, [name]):
        refuse(path, f"its architecture is not {name}")


def _make(config_class: Any, found: dict[str, Any], path: pathlib.Path) -> Any:
    """The config object."""
    try:
        return config_class.from_dict({key: value for key, value in found.items() if key != "model_type"})
    except (
        Exception
    ) as error:  # transformers raises what it likes about a bad value; the value stays out of the message
        refuse(path, f"{config_class.__name__} does not accept it ({type(error).__name__})")


def _check_attention(config: Any, path: pathlib.Path) -> None:
    """Refuse a language model that does not see its whole prompt."""
    is_windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if is_windowed or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        refuse(path, "it attends within a sliding window, which the engine does not serve")


def _list_numbers(value: object) -> Iterator[float]:
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _list_numbers(item)
    elif isinstance(value, int | float):
        yield value
