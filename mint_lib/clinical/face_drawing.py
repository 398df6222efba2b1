"""Draws one head from the values of its axes: outline, hair, ears, eyes, nose and mouth.

Goes in: axis names with values (0 is average, 1 a clear deviation), sex, age and a generator. Comes out: an image.
Constants are shares of the photo's width, chosen by eye. Knows neither findings nor light.
"""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image, ImageDraw

_CANVAS = 336  # three times GestaltMML's 112 pixels, then scaled down: smooth edges without anti-aliasing
_SKIN = ((246, 214, 190), (232, 190, 160), (205, 155, 120), (160, 110, 80), (105, 70, 50))
_HAIR = ((225, 190, 120), (150, 100, 55), (95, 60, 35), (45, 32, 26), (22, 18, 18))
_GREY = (190, 188, 184)
_IRIS = ((95, 130, 160), (100, 120, 80), (95, 65, 40), (60, 40, 28))


def draw_head(axes: dict[str, float], *, is_male: bool, age_years: float, rng: "np.random.Generator") -> "Image.Image":
    """A head before a plain background, on a square canvas larger than any photo.

    Args:
        axes: value of each axis by its name.
        is_male: shorter hair and a heavier brow and jaw in adults.
        age_years: moves proportions; grey hair from about 55.
        rng: decides pose and colours.
    """
    from PIL import Image, ImageDraw

    background = tuple(int(value) for value in rng.uniform(110, 220) + rng.normal(0, 14, 3))
    image = Image.new("RGB", (_CANVAS, _CANVAS), background)
    _draw_features(_Brush(ImageDraw.Draw(image), rng), axes, is_male, age_years, rng)
    return image


class _Brush:
    """Draws shapes given in the face's own coordinates (0 to 1, y down) as this photo's pose shows them."""

    def __init__(self, draw: "ImageDraw.ImageDraw", rng: "np.random.Generator"):
        self._draw = draw
        self._yaw = rng.uniform(-0.012, 0.012)
        angle = rng.uniform(-0.035, 0.035)
        scale = rng.uniform(1.21, 1.25) * _CANVAS
        self._cos, self._sin = math.cos(angle) * scale, math.sin(angle) * scale
        self._shift = rng.uniform(-0.008, 0.008, 2) * _CANVAS + _CANVAS / 2

    def _place(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        placed = []
        for x, y in points:
            # Turning the head moves the middle of the face more than its rim.
            x = x - 0.5 + self._yaw * max(0.0, 1 - ((x - 0.5) / 0.3) ** 2)
            y = y - 0.5
            placed.append(
                (x * self._cos - y * self._sin + self._shift[0], x * self._sin + y * self._cos + self._shift[1])
            )
        return placed

    def fill(self, points: Iterable[tuple[float, float]], color: tuple[int, ...]) -> None:
        """Fill a polygon."""
        self._draw.polygon(self._place(points), fill=color)

    def stroke(self, points: Iterable[tuple[float, float]], color: tuple[int, ...], width: float) -> None:
        """Draw an open line; `width` in the face's own unit."""
        pixels = round(width * _CANVAS)
        if pixels > 0:
            self._draw.line(self._place(points), fill=color, width=pixels, joint="curve")

    def oval(self, x: float, y: float, half_width: float, half_height: float, color: tuple[int, ...]) -> None:
        """Fill an ellipse."""
        self.fill([(x + half_width * cos, y + half_height * sin) for cos, sin in _CIRCLE], color)


_CIRCLE = [(math.cos(2 * math.pi * step / 28), math.sin(2 * math.pi * step / 28)) for step in range(28)]


def _draw_features(
    brush: _Brush, p: dict[str, float], is_male: bool, age_years: float, rng: "np.random.Generator"
) -> None:
    """Hair, ears, outline and features; `p` maps axis names to values."""
    child = max(0.0, 1 - age_years / 14)
    adult_male = is_male and age_years >= 15
    tone = rng.uniform(0, len(_SKIN) - 1)
    skin = _blend_palette(_SKIN, tone)
    hair = _blend_palette(_HAIR, min(len(_HAIR) - 1.0, tone + rng.uniform(0, 2.5)))
    hair = _mix(hair, _GREY, min(0.9, max(0.0, (age_years - 45) / 30)))
    shade, glow = _mix(skin, (40, 20, 15), 0.2), _mix(skin, (255, 245, 235), 0.25)

    half = 0.262 * (1 - 0.045 * p["face length"]) + 0.008 * child
    top = 0.13
    chin_y = 0.865 + 0.016 * p["face length"] + 0.024 * p["chin size"] - 0.03 * child
    eye_y = 0.475 + 0.022 * child
    nose_y = eye_y + 0.155 + 0.02 * p["nose length"] - 0.025 * child
    mouth_y = nose_y + 0.07 + 0.016 * p["philtrum length"] - 0.008 * child
    hairline_y = 0.285 - 0.026 * p["forehead height"]
    brow_y = eye_y - 0.075 - 0.004 * child

    # Hair behind the head, neck and clothes.
    length = 0.62 if is_male or age_years < 1 else rng.uniform(0.7, 0.98)
    if age_years >= 1:
        back = [(0.0, 0.07), (0.2, 0.1), (half + 0.05, 0.25), (half + 0.06, 0.5), (half + 0.03, length), (0.1, length)]
        brush.fill(_mirror(_smooth(back)), hair)
    brush.fill(_mirror([(0.11, 0.75), (0.12, 1.1)]), shade)
    brush.fill(_mirror([(0.1, 0.97), (0.33, 1.03), (0.45, 1.15)]), tuple(int(v) for v in rng.uniform(40, 200, 3)))

    # Ears, then the outline over them.
    ear_y, ear = eye_y + 0.05 - 0.03 * p["ear position"], 1 + 0.17 * p["ear size"]
    for side in (-1, 1):
        brush.oval(0.5 + side * (half + 0.018 * ear), ear_y, 0.034 * ear, 0.066 * ear, skin)
        brush.oval(0.5 + side * (half + 0.022 * ear), ear_y, 0.017 * ear, 0.042 * ear, shade)
    brow_width = half * (0.95 + 0.055 * p["forehead width"])
    cheek_width = half * (0.98 + 0.055 * p["cheeks"] + 0.03 * child)
    jaw_width = half * (0.80 - 0.075 * p["chin point"] + 0.04 * adult_male + 0.04 * p["cheeks"])
    chin_width = half * (0.40 - 0.10 * p["chin point"] + 0.05 * adult_male)
    outline = [
        (0.0, top),
        (brow_width * 0.62, top + 0.035),
        (brow_width * 0.96, 0.27),
        (brow_width, 0.38),
        (half, eye_y + 0.03),
        (cheek_width, 0.60),
        (jaw_width, 0.60 + (chin_y - 0.60) * 0.58),
        (chin_width, chin_y - 0.022),
        (0.0, chin_y),
    ]
    brush.fill(_mirror(_smooth(outline)), skin)
    for side in (-1, 1):  # cheekbones: full cheeks catch light, a flat midface lies in shadow
        for size, strength in ((1.0, 0.12), (0.75, 0.24), (0.5, 0.36)):
            cheek = _mix(skin, glow if p["cheeks"] > 0 else shade, min(0.9, strength * abs(p["cheeks"])))
            brush.oval(0.5 + side * 0.145, nose_y - 0.02, 0.066 * size, 0.054 * size, cheek)
    brush.oval(0.5, chin_y - 0.055, 0.045, 0.02, _mix(skin, glow, 0.3))
    if age_years > 45:
        for side in (-1, 1):
            fold = [(0.5 + side * 0.07, nose_y), (0.5 + side * 0.105, mouth_y + 0.01)]
            brush.stroke(fold, shade, 0.006)

    # Hair above the forehead.
    if age_years >= 1:
        line = [(0.0, hairline_y), (brow_width * 0.6, hairline_y + 0.012), (brow_width * 0.97, hairline_y + 0.1)]
        crown = [(half + 0.012, 0.4), (half + 0.04, 0.25), (0.19, 0.095), (0.0, 0.07)]
        brush.fill(_mirror(_smooth(line) + _smooth(crown)), hair)
    else:
        line = [(0.0, hairline_y - 0.04), (brow_width * 0.5, hairline_y - 0.03), (brow_width * 0.93, 0.27)]
        crown = [(brow_width * 0.93, 0.26), (brow_width * 0.62, top + 0.03), (0.0, top - 0.006)]
        brush.fill(_mirror(_smooth(line) + _smooth(crown)), _mix(skin, hair, 0.35))

    _draw_eyes(brush, p, eye_y, brow_y, skin, shade, hair, child, adult_male, rng)
    _draw_nose(brush, p, eye_y, nose_y, shade, glow)
    _draw_mouth(brush, p, nose_y, mouth_y, skin, shade, is_male)


def _draw_eyes(
    brush: _Brush,
    p: dict[str, float],
    eye_y: float,
    brow_y: float,
    skin: tuple[int, ...],
    shade: tuple[int, ...],
    hair: tuple[int, ...],
    child: float,
    adult_male: bool,
    rng: "np.random.Generator",
) -> None:
    """Eyes, lids, lashes and brows."""
    iris = _blend_palette(_IRIS, rng.uniform(0, len(_IRIS) - 1))
    dark = _mix(hair, (20, 12, 10), 0.6)
    spacing = 0.117 + 0.015 * p["eye spacing"]
    width = 0.053 + 0.0075 * p["eye width"]
    opening = max(0.004, 0.0235 + 0.0062 * p["lid opening"] + 0.004 * child)
    slant = math.tan(0.14 * p["eye slant"])
    thickness = max(0.0, 0.013 + 0.0045 * p["brow thickness"] + 0.003 * adult_male)
    arch = 0.013 + 0.0085 * p["brow arch"]
    for side in (-1, 1):
        center = 0.5 + side * spacing

        def at(along: float, up: float, *, center: float = center, side: int = side) -> tuple[float, float]:
            """A point of this eye: `along` from its middle outwards, `up` above the slanted axis."""
            return center + side * along, eye_y - slant * along - up

        depth = _mix(skin, (30, 15, 12), min(0.42, max(0.0, 0.13 + 0.11 * p["eye depth"])))
        brush.oval(center, eye_y - 0.012, width * 1.25, opening + 0.024, depth)
        steps = [step / 8 for step in range(-8, 9)]
        upper = [at(width * s, opening * (1 - s * s)) for s in steps]
        lower = [at(width * s, -0.8 * opening * (1 - s * s)) for s in steps]
        brush.fill(upper + lower[::-1], (240, 238, 234))
        radius = min(0.024, opening * 1.05)
        brush.oval(center, eye_y - 0.1 * opening, radius, radius, iris)
        brush.oval(center, eye_y - 0.1 * opening, radius * 0.48, radius * 0.48, (15, 12, 12))
        brush.oval(center + 0.007, eye_y - 0.3 * opening, radius * 0.2, radius * 0.2, (250, 250, 250))
        brush.stroke(upper, dark, 0.007)
        brush.stroke(lower, _mix(shade, dark, 0.3), 0.004)
        crease = [at(width * s, opening * (1 - s * s) + 0.013) for s in steps[2:-2]]
        brush.stroke(crease, _mix(skin, dark, 0.35), 0.004)
        lash = 0.008 + 0.01 * p["lash length"]
        if lash > 0.002:
            for s in (-0.5, -0.1, 0.3, 0.65, 0.95):
                root = at(width * s, opening * (1 - s * s))
                tip = at(width * s * 1.12 + 0.003, opening * (1 - s * s) + lash)
                brush.stroke([root, tip], dark, 0.006)
        fold = 0.4 + 0.65 * p["epicanthus"]
        if fold > 0:  # a fold of skin over the inner corner
            size = 0.021 * min(2.0, fold)
            inner = [at(-width - 0.006, -size), at(-width + size * 1.1, size * 0.1), at(-width - 0.004, size * 1.1)]
            brush.fill(inner, _mix(skin, shade, 0.5))
            brush.stroke(inner[1:], _mix(shade, dark, 0.4), 0.006)

        brow = [(-width * 1.15, -0.002), (-width * 0.3, arch * 0.75), (width * 0.45, arch), (width * 1.45, -0.012)]
        upper_rim = [(center + side * along, brow_y - rise - thickness * 0.5) for along, rise in brow]
        lower_rim = [(center + side * along, brow_y - rise + thickness * 0.5) for along, rise in brow]
        if thickness > 0.001:
            brush.fill(upper_rim + lower_rim[::-1], _mix(skin, dark, min(0.95, 0.55 + 0.12 * p["brow thickness"])))
    density = min(0.85, max(0.0, 0.3 * p["synophrys"] - 0.05))
    gap = max(0.01, spacing - width)
    height = 0.5 * max(0.012, thickness)
    brush.fill([(0.5 + x, brow_y + y) for x, y in _box(gap, height)], _mix(skin, dark, density))


def _draw_nose(
    brush: _Brush, p: dict[str, float], eye_y: float, nose_y: float, shade: tuple[int, ...], glow: tuple[int, ...]
) -> None:
    """Bridge, tip, wings and nostrils."""
    bridge = max(0.006, 0.023 + 0.011 * p["nasal bridge width"])
    tip = max(0.018, 0.043 + 0.0085 * p["nasal tip width"])
    relief = min(1.0, max(0.0, 0.45 + 0.28 * p["nasal bridge height"]))
    for side in (-1, 1):
        line = [(0.5 + side * bridge, eye_y - 0.02), (0.5 + side * bridge, eye_y + 0.05), (0.5 + side * tip, nose_y)]
        brush.stroke(_smooth(line), _mix(glow, _mix(shade, (60, 30, 25), 0.15), 0.5 + 0.5 * relief), 0.008)
    brush.fill([(0.5 + x, y) for x, y in _ridge(bridge * 0.45, eye_y - 0.02, nose_y - 0.03)], _mix(shade, glow, relief))
    brush.oval(0.5, nose_y - 0.012, tip * 0.72, 0.024, _mix(shade, glow, 0.62))
    for side in (-1, 1):
        brush.oval(0.5 + side * tip * 0.85, nose_y - 0.003, tip * 0.3, 0.017, _mix(shade, glow, 0.22))
        opening = max(0.002, 0.0062 + 0.005 * p["nares anteversion"])
        brush.oval(0.5 + side * tip * 0.45, nose_y + 0.006, tip * 0.24, opening, _mix(shade, (35, 15, 12), 0.65))
    columella = max(0.0, -0.008 * p["nares anteversion"])
    brush.oval(0.5, nose_y + 0.006 + columella, tip * 0.2, 0.006 + columella, _mix(shade, glow, 0.3))


def _draw_mouth(
    brush: _Brush,
    p: dict[str, float],
    nose_y: float,
    mouth_y: float,
    skin: tuple[int, ...],
    shade: tuple[int, ...],
    is_male: bool,
) -> None:
    """Philtrum and lips."""
    lip = _mix(skin, (196, 78, 84), 0.45 if is_male else 0.6)
    width = 0.078 + 0.013 * p["mouth width"]
    upper = max(0.003, 0.0165 + 0.0085 * p["upper lip"])
    lower = max(0.004, 0.022 + 0.01 * p["lower lip"])
    droop = -0.017 * p["mouth corners"]
    bow = 0.004 + 0.012 * p["cupid's bow"]
    groove = min(1.0, max(0.0, 0.4 + 0.35 * p["philtrum depth"]))
    for side in (-1, 1):
        line = [(0.5 + side * 0.012, nose_y + 0.016), (0.5 + side * 0.016, mouth_y - upper - 0.004)]
        brush.stroke(line, _mix(skin, _mix(shade, (60, 30, 25), 0.5), groove), 0.009)
    rim = [(0.0, mouth_y - upper + bow), (0.018, mouth_y - upper - bow * 0.5), (width, mouth_y + droop)]
    brush.fill(_mirror([*_smooth(rim), (0.0, mouth_y + 0.002)]), _mix(lip, (60, 20, 20), 0.12))
    bottom = [(width, mouth_y + droop), (width * 0.55, mouth_y + lower * 0.85), (0.0, mouth_y + lower)]
    brush.fill(_mirror([(0.0, mouth_y), *_smooth(bottom)]), lip)
    seam = [(0.5 + width * s, mouth_y + droop * s * s) for s in (-1, -0.6, -0.2, 0.2, 0.6, 1)]
    brush.stroke(seam, _mix(lip, (40, 10, 12), 0.6), 0.006)
    brush.oval(0.5, mouth_y + lower + 0.017, 0.035, 0.006, _mix(skin, shade, 0.6))


def _mirror(right: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A closed shape symmetric about the middle from its right half; x counts from the middle."""
    return [(0.5 + x, y) for x, y in right] + [(0.5 - x, y) for x, y in reversed(right)]


def _smooth(points: list[tuple[float, float]], steps: int = 5) -> list[tuple[float, float]]:
    """Catmull-Rom spline through `points`."""
    padded = [points[0], *points, points[-1]]
    curve = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        for step in range(steps):
            t = step / steps
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
            curve.append(
                tuple(sum(w * point[i] for w, point in zip(weights, (a, b, c, d), strict=True)) / 2 for i in (0, 1))
            )
    return [*curve, points[-1]]  # type: ignore[list-item]


def _box(half_width: float, half_height: float) -> list[tuple[float, float]]:
    return [
        (-half_width, -half_height),
        (half_width, -half_height),
        (half_width, half_height),
        (-half_width, half_height),
    ]


def _ridge(half_width: float, top: float, bottom: float) -> list[tuple[float, float]]:
    return [(-half_width, top), (half_width, top), (half_width * 1.3, bottom), (-half_width * 1.3, bottom)]


def _mix(first: tuple[int, ...], second: tuple[int, ...], share: float) -> tuple[int, ...]:
    """`first` with `share` of `second`."""
    share = min(1.0, max(0.0, share))
    return tuple(int(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def _blend_palette(palette: tuple[tuple[int, ...], ...], position: float) -> tuple[int, ...]:
    """The colour at `position` (0 to length - 1) of a palette."""
    index = min(int(position), len(palette) - 2)
    return _mix(palette[index], palette[index + 1], position - index)
