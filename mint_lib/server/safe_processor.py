"""The files that say how a student sees, looked at before an image processor is made from them.

Goes in: a base's folder. Comes out: nothing, or the reason for refusing it. Only classes that transformers has for
Pillow are taken, with plain values: no code, no files elsewhere, no sizes beyond reason. It decodes nothing.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from mint_lib.server.safe_files import read_json_object, refuse

FILES = ("preprocessor_config.json", "processor_config.json")
CLASSES = frozenset(["CLIP", "Idefics3", "Llava", "Mllama", "Qwen2VL", "Siglip", "SmolVLM"])
"""Image processors by the beginning of their classes' names."""
_PROCESSORS = frozenset(["Idefics3", "Llava", "Mllama", "Qwen2VL", "Qwen2_5_VL", "SmolVLM"])
_ENDINGS = ("ImageProcessorFast", "ImageProcessorPil", "ImageProcessor")
_SWITCHES = frozenset(
    ["do_center_crop", "do_convert_rgb", "do_image_splitting", "do_normalize", "do_pad", "do_rescale", "do_resize"]
)
_SIZES = frozenset(["crop_size", "max_image_size", "size"])
_NUMBERS: Mapping[str, float] = {
    "image_seq_len": 65_536,
    "image_seq_length": 65_536,
    "max_image_tiles": 64,
    "max_pixels": 4096**2,
    "merge_size": 64,
    "min_pixels": 4096**2,
    "num_additional_image_tokens": 64,
    "patch_size": 4096,
    "resample": 5,
    "rescale_factor": 1,
    "temporal_patch_size": 64,
}
"""Largest value of each number."""
_INERT = frozenset(["image_processor_type", "processor_class", "data_format", "input_data_format"])
_WORDS = frozenset(["chat_template", "image_token", "vision_feature_select_strategy", "return_tensors"])
_MAX_SIDE = 4096
_MAX_AREA = 4096**2
"""Qwen2-VL counts a whole image's pixels where others give a side."""


def check_processor(folder: pathlib.Path) -> None:
    """Refuse an image processor that is not a plain one of transformers'.

    Raises:
        InvalidInput: no file describes one, a class or key is unknown, or a value is absurd.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        refuse(folder / FILES[0], "it is missing, and nothing says how the student sees")
    for path in found:
        values = read_json_object(path)
        inner = values.pop("image_processor", None)
        if inner is not None:
            if not isinstance(inner, dict):
                refuse(path, "its image processor is no object")
            _check_values(inner, path)
        _check_values(values, path)


def _check_values(values: Mapping[str, Any], path: pathlib.Path) -> None:
    kind = values.get("image_processor_type")
    if kind is not None and not (isinstance(kind, str) and any(kind == f"{c}{e}" for c in CLASSES for e in _ENDINGS)):
        refuse(path, f"its image processor is none of {', '.join(sorted(CLASSES))}")
    outer = values.get("processor_class")
    if outer is not None and outer not in {f"{name}Processor" for name in _PROCESSORS}:
        refuse(path, f"its processor is none of {', '.join(sorted(_PROCESSORS))}")
    for key, value in values.items():
        if value is None or key in _INERT:
            is_allowed = value is None or isinstance(value, str)
        elif key in _SWITCHES:
            is_allowed = isinstance(value, bool)
        elif key in _SIZES:
            is_allowed = _is_size(value)
        elif key in _NUMBERS:
            is_allowed = type(value) in (int, float) and 0 <= value <= _NUMBERS[key]
        elif key in ("image_mean", "image_std"):
            is_allowed = isinstance(value, list) and len(value) == 3 and all(_is_fraction(item) for item in value)
        elif key in _WORDS:
            is_allowed = isinstance(value, str)
        else:
            refuse(path, "it holds a key that is not on the list of known ones")
        if not is_allowed:
            refuse(path, f"{key} has a value that is not allowed")


def _is_size(value: object) -> bool:
    """A side in pixels, or several by name."""
    if isinstance(value, dict):
        limits = {"height": _MAX_SIDE, "width": _MAX_SIDE, "shortest_edge": _MAX_AREA, "longest_edge": _MAX_AREA}
        return value.keys() <= limits.keys() and all(_is_side(side, limits[name]) for name, side in value.items())
    return _is_side(value, _MAX_SIDE)


def _is_side(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
