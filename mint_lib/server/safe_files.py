"""Files from outside, looked at before any of their content is used: JSON, and safetensors by their header alone.

Goes in: a path. Comes out: the JSON object, or the table of tensors that a safetensors file holds, after everything the
file says about itself was found to be true. No tensor is read, nothing is unpickled, and messages name the file but
never repeat what it holds. Format: github.com/huggingface/safetensors, "Format".
"""

import json
import math
import pathlib
from typing import Any, NamedTuple, NoReturn

from mint_lib.errors import InvalidInput

MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own limit."""
MAX_JSON_BYTES = 16 * 2**20
"""Larger than any config file; tokenizer.json is not read here."""
MAX_RANK = 8
_LENGTH_BYTES = 8
_BYTES_OF = {"F32": 4, "F16": 2, "BF16": 2}
"""Allowed element types. Integers would be quantised weights, which no student has."""
_COUNTER_BYTES = {"I64": 8}
"""Allowed for a single number: how many batches a normalisation has seen."""
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04", b"PK\x05\x06")
"""A pickle of protocol 2 and later, and the zip archive that torch.save writes."""


class TensorFacts(NamedTuple):
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def check_safetensors(path: pathlib.Path) -> dict[str, TensorFacts]:
    """The tensors in `path` by name, after its header was found to describe the file exactly.

    Raises:
        InvalidInput: the header is too long, is no JSON or names something twice; an element type is not allowed; the
            tensors' places overlap, leave gaps, reach beyond the file, or do not have the size of their shapes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        if start.startswith(_PICKLE_STARTS):
            refuse(path, "it begins like a pickle or a zip archive")
        header_bytes = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
            refuse(path, f"its header does not fit {size} bytes or the limit of {MAX_HEADER_BYTES}")
        header = _parse_object(file.read(header_bytes), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        refuse(path, "its metadata is not a map of strings")
    tensors, spans = {}, []
    for name, entry in header.items():
        facts, begin, end = _read_entry(entry, path)
        tensors[name] = facts
        spans.append((begin, end))
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            refuse(path, "its tensors overlap or leave gaps")
        place = end
    if _LENGTH_BYTES + header_bytes + place != size:
        refuse(path, f"its tensors end at another place than its {size} bytes")
    return tensors


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        InvalidInput: it is missing, too large, no JSON, nested too deep, no object, or holds a key twice or NaN.
    """
    if not path.is_file():
        refuse(path, "it is missing")
    if path.stat().st_size > MAX_JSON_BYTES:
        refuse(path, f"it has more than {MAX_JSON_BYTES} bytes")
    return _parse_object(path.read_bytes(), path)


def refuse(path: pathlib.Path, problem: str) -> NoReturn:
    """Raise InvalidInput about the file `path`."""
    raise InvalidInput(
        f"{path.name} is refused: {problem}. Nothing of it was used. Make the version again with the platform, which "
        "writes plain configs and safetensors only."
    )


def _parse_object(data: bytes, path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(data.decode(), object_pairs_hook=_build_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        refuse(path, "it is not JSON in UTF-8 with every key once and finite numbers")
    if not isinstance(value, dict):
        refuse(path, "it is not a JSON object")
    return value


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        raise ValueError("a key stands twice")
    return built


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _read_entry(entry: object, path: pathlib.Path) -> tuple[TensorFacts, int, int]:
    """The facts, begin and end of one tensor of a header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        refuse(path, "a tensor lacks its type, shape or place, or has more than these")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bytes_of = _BYTES_OF | (_COUNTER_BYTES if shape == [] else {})
    if not isinstance(dtype, str) or dtype not in bytes_of:
        refuse(path, f"a tensor's element type is none of {', '.join(_BYTES_OF)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK or not _are_sizes(offsets) or len(offsets) != 2:
        refuse(path, "a tensor's shape or place is not a list of sizes")
    begin, end = offsets
    if end - begin != math.prod(shape) * bytes_of[dtype]:
        refuse(path, "a tensor's place has another size than its shape")
    return TensorFacts(dtype, tuple(shape)), begin, end


def _are_sizes(value: object) -> bool:
    """Whether `value` is a list of integers that are sizes in a file; bool is an int in Python, and is none here."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
