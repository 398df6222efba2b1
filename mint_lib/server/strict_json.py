"""JSON bodies, read strictly: what one parser would take and another refuse is refused here.

Goes in: bytes. Comes out: the object they spell, or `InvalidInput` in words that quote nothing of the content. It knows
no schema.
"""

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

from mint_lib.errors import InvalidInput

_MAX_INTEGER = 2**63


def parse_object(data: bytes, *, max_depth: int) -> dict[str, Any]:
    """The JSON object that `data` spells.

    Raises:
        InvalidInput: not UTF-8, not JSON (RFC 8259), not an object, a key twice, NaN or an infinity (also written as
            1e400), an integer beyond 64 bits, a lone surrogate, a NUL, or nested deeper than `max_depth`.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"The body is not UTF-8 (at byte {error.start}). Send JSON in UTF-8.") from None
    try:
        found = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_short_integer,
        )
    except RecursionError:
        raise _too_deep(max_depth) from None
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"The body is not JSON: {error.msg} at character {error.pos}. Send one JSON object."
        ) from None
    if not isinstance(found, dict):
        raise InvalidInput("The body is JSON, but not an object. Send one JSON object.")
    _check_tree(found, max_depth)
    return found


def _check_tree(found: dict[str, Any], max_depth: int) -> None:
    """Depth and strings of a parsed body, level by level, so that no nesting exhausts the stack."""
    level: list[Any] = [found]
    for _ in range(max_depth):
        deeper: list[Any] = []
        for node in level:
            values: Iterable[Any] = node
            if isinstance(node, dict):
                for key in node:
                    _check_string(key)
                values = node.values()
            for value in values:
                if isinstance(value, str):
                    _check_string(value)
                elif isinstance(value, dict | list):
                    deeper.append(value)
        if not deeper:
            return
        level = deeper
    raise _too_deep(max_depth)


def _check_string(text: str) -> None:
    if "\x00" in text:
        raise InvalidInput("A string of the body holds a NUL character. Remove it.")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise InvalidInput("A string of the body holds half of a surrogate pair. Send whole characters.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidInput("An object of the body names one key twice. Name each key once.")
    return found


def _refuse_constant(_: str) -> NoReturn:
    raise InvalidInput("The body holds NaN or Infinity, which are not JSON. Send finite numbers.")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise InvalidInput("A number of the body is beyond what a 64-bit float holds. Send finite numbers.")
    return number


def _short_integer(digits: str) -> int:
    # int() refuses 4,301 digits with a ValueError and takes long for fewer: the length decides first.
    if len(digits) > 20 or not -_MAX_INTEGER <= int(digits) < _MAX_INTEGER:
        raise InvalidInput("An integer of the body does not fit 64 bits. Send smaller numbers.")
    return int(digits)


def _too_deep(max_depth: int) -> InvalidInput:
    return InvalidInput(f"The body is nested deeper than {max_depth} levels. Flatten it.")
