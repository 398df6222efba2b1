"""Kubernetes' quantities: numbers with a unit, as `500m`, `2Gi` or `1e3`.

Goes in: what stands under requests and limits. Comes out: exact numbers. It knows no resource.
"""

import re
from fractions import Fraction

_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(Ki|Mi|Gi|Ti|Pi|Ei|n|u|m|k|M|G|T|P|E|[eE][+-]?\d+)?")
_UNITS = {"": Fraction(1), "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 1000)}
_UNITS |= {unit: Fraction(1000 ** (place + 1)) for place, unit in enumerate("kMGTPE")}
_UNITS |= {f"{unit}i": Fraction(1024 ** (place + 1)) for place, unit in enumerate("KMGTPE")}


def parse_quantity(text: str | int | float) -> Fraction:
    """The number that a quantity stands for, in cores, bytes or pieces.

    Raises:
        ValueError: it is not a quantity.
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise ValueError(f"{text!r} is not a quantity as 500m, 2Gi or 1e3.")
    number, unit = match.group(1), match.group(2) or ""
    if unit[:1] in ("e", "E") and len(unit) > 1 and unit != "Ei":
        return Fraction(number) * Fraction(10) ** int(unit[1:])
    return Fraction(number) * _UNITS[unit]
