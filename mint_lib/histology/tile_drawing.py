"""Draws a simulated tile: nuclei, cytoplasm, stroma and lumina in haematoxylin and eosin.

Goes in: a patient, the attributes of a tile and a random generator. Comes out: a JPEG and the number of nuclei in it.
Stains are added up as optical densities and turned into colours by Beer and Lambert's law. Knows no tissue by name.

Shape suffixes: H, W pixels of the tile; N nuclei; P pixels of the square that one nucleus is drawn in; 2 is (x, y).
"""

import io
import math
from typing import TYPE_CHECKING, NamedTuple

from mint_lib.histology.tissue_model import SimulatedPatient, TileAttributes

if TYPE_CHECKING:
    import numpy as np

FIELD_MICRONS = 64.0
"""Side of a tile: 128 pixels are then a 20x scan."""


class _Nuclei(NamedTuple):
    """Place (N x 2, pixels), direction of the long axis (N, radians) and half axes (N, pixels) of the nuclei."""

    places: "np.ndarray"
    angles: "np.ndarray"
    long: "np.ndarray"
    short: "np.ndarray"


class _Ground(NamedTuple):
    """What lies under the nuclei: stroma (H x W, 0 to 1), direction of its fibres, lumina with centre and radius."""

    stroma: "np.ndarray"
    fibre_angle: float
    lumina: tuple[tuple[float, float, float], ...]


def draw_tile(
    patient: SimulatedPatient, attributes: TileAttributes, *, size_pixels: int, rng: "np.random.Generator"
) -> tuple[bytes, int]:
    """A tile of `size_pixels` squared as JPEG, and how many nuclei were placed in it."""
    import numpy as np
    from PIL import Image, ImageFilter

    scale = size_pixels / FIELD_MICRONS
    ground = _lay_ground(attributes, size_pixels, rng)
    nuclei = _place_nuclei(attributes, ground, size_pixels, rng)
    haematoxylin_HW = _stain_nuclei(nuclei, attributes, size_pixels, rng)
    eosin_HW = _stain_ground(ground, size_pixels, rng)
    background_HW = 0.07 + 0.05 * _make_noise(size_pixels, size_pixels // 6, rng)
    empty_HW = _find_empty(ground, size_pixels, rng)
    eosin_HW = eosin_HW * (1 - 0.45 * np.minimum(haematoxylin_HW, 1)) * (1 - empty_HW)
    haematoxylin_HW = np.maximum(haematoxylin_HW, np.maximum(background_HW, 0) * (1 - empty_HW))
    density_HWC = haematoxylin_HW[..., None] * np.array(patient.haematoxylin, dtype=np.float32)
    density_HWC += eosin_HW[..., None] * np.array(patient.eosin, dtype=np.float32)
    density_HWC += rng.normal(0.02, 0.012, (size_pixels, size_pixels, 1)).astype(np.float32)
    pixels_HWC = np.clip(248 * np.exp(-density_HWC), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels_HWC).filter(ImageFilter.GaussianBlur(patient.blur_pixels * scale / 2))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=patient.jpeg_quality)
    return buffer.getvalue(), len(nuclei.places)


def _make_noise(size_pixels: int, num_cells: int, rng: "np.random.Generator") -> "np.ndarray":
    """Smooth noise with `num_cells` cells a side, mean 0 and deviation 1 (H x W)."""
    import numpy as np
    from PIL import Image

    cells = Image.fromarray(rng.normal(size=(num_cells, num_cells)).astype(np.float32))
    noise_HW = np.asarray(cells.resize((size_pixels, size_pixels), Image.Resampling.BICUBIC))
    return (noise_HW - noise_HW.mean()) / (noise_HW.std() + 1e-6)


def _lay_ground(attributes: TileAttributes, size_pixels: int, rng: "np.random.Generator") -> _Ground:
    import numpy as np

    noise_HW = _make_noise(size_pixels, 5, rng)
    edge = np.quantile(noise_HW[::4, ::4], 1 - attributes.stroma_fraction)
    stroma_HW = 1 / (1 + np.exp(np.clip((edge - noise_HW) * 9, -30, 30)))
    lumina: list[tuple[float, float, float]] = []
    if attributes.arrangement == "glandular":
        for _ in range(40):
            radius = rng.uniform(0.13, 0.2) * size_pixels
            x, y = rng.uniform(-0.05, 1.05, 2) * size_pixels
            if all(math.hypot(x - a, y - b) > 1.25 * (radius + other) for a, b, other in lumina):
                lumina.append((float(x), float(y), float(radius)))
            if len(lumina) == 4:
                break
        yy, xx = np.mgrid[:size_pixels, :size_pixels]
        for x, y, radius in lumina:  # a gland is not stroma
            stroma_HW = stroma_HW * (((xx - x) ** 2 + (yy - y) ** 2) > (1.25 * radius) ** 2)
    return _Ground(stroma_HW.astype(np.float32), float(rng.uniform(0, math.pi)), tuple(lumina))


def _place_nuclei(attributes: TileAttributes, ground: _Ground, size_pixels: int, rng: "np.random.Generator") -> _Nuclei:
    """Nuclei where the arrangement has them, pushed apart so that they touch but hardly overlap."""
    import numpy as np

    scale = size_pixels / FIELD_MICRONS
    wanted = max(3, int(rng.poisson(attributes.nuclei_per_mm2 * FIELD_MICRONS**2 * 1e-6)))
    num_tried = 7 * wanted
    places_N2, angles_N = _propose_places(attributes, ground, size_pixels, num_tried, rng)
    spread = math.sqrt(math.log(1 + attributes.area_variation**2))
    area_N = attributes.area_um2 * np.exp(rng.normal(-(spread**2) / 2, spread, num_tried)) * scale**2
    eccentricity_N = np.clip(rng.normal(attributes.eccentricity, 0.08, num_tried), 0.1, 0.96)
    inside_N2 = np.clip(places_N2, 0, size_pixels - 1).astype(int)
    stroma_N = ground.stroma[inside_N2[:, 1], inside_N2[:, 0]]
    is_fibroblast_N = stroma_N > 0.5
    keep_N = ~is_fibroblast_N | (rng.random(num_tried) < 0.25)
    area_N = np.where(is_fibroblast_N, area_N * 0.6, area_N)
    eccentricity_N = np.where(is_fibroblast_N, 0.95, eccentricity_N)
    angles_N = np.where(is_fibroblast_N, ground.fibre_angle + rng.normal(0, 0.25, num_tried), angles_N)
    ratio_N = (1 - eccentricity_N**2) ** 0.25
    radius_N = np.sqrt(np.clip(area_N, 6, 4 * attributes.area_um2 * scale**2) / math.pi)
    accepted: list[int] = []
    taken_N3 = np.empty((num_tried, 3))
    for index in np.flatnonzero(keep_N):
        x, y = places_N2[index]
        count = len(accepted)
        reach = 0.88 * (taken_N3[:count, 2] + radius_N[index])
        if not ((taken_N3[:count, 0] - x) ** 2 + (taken_N3[:count, 1] - y) ** 2 < reach * reach).any():
            taken_N3[count] = x, y, radius_N[index]
            accepted.append(int(index))
            if count + 1 == wanted:
                break
    chosen = np.array(accepted, dtype=int)
    return _Nuclei(places_N2[chosen], angles_N[chosen], (radius_N / ratio_N)[chosen], (radius_N * ratio_N)[chosen])


def _propose_places(
    attributes: TileAttributes, ground: _Ground, size_pixels: int, number: int, rng: "np.random.Generator"
) -> tuple["np.ndarray", "np.ndarray"]:
    """Places (x, y) and directions, more than will be kept."""
    import numpy as np

    scale = size_pixels / FIELD_MICRONS
    places_N2 = rng.uniform(0, size_pixels, (number, 2))
    angles_N = rng.uniform(0, math.pi, number)
    if attributes.arrangement == "clustered":
        nests = rng.uniform(0.1, 0.9, (int(rng.integers(2, 4)), 2)) * size_pixels
        places_N2 = nests[rng.integers(len(nests), size=number)] + rng.normal(0, 8 * scale, (number, 2))
    elif attributes.arrangement == "glandular" and ground.lumina:
        rings = np.array(ground.lumina)[rng.integers(len(ground.lumina), size=number)]
        turn_N = rng.uniform(0, 2 * math.pi, number)
        reach_N = rings[:, 2] + np.abs(rng.normal(0, 1.2 * scale, number))
        places_N2 = rings[:, :2] + reach_N[:, None] * np.stack([np.cos(turn_N), np.sin(turn_N)], axis=1)
        angles_N = turn_N + rng.normal(0, 0.25, number)
    elif attributes.arrangement == "files":
        angle, gap = rng.uniform(0, math.pi), rng.uniform(9, 13) * scale
        along_N = rng.uniform(-0.75, 0.75, number) * size_pixels
        line_N = rng.integers(-8, 9, number)
        across_N = line_N * gap + rng.normal(0, 0.8 * scale, number) + 3 * scale * np.sin(along_N / (9 * scale))
        direction, normal = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
        places_N2 = size_pixels / 2 + along_N[:, None] * direction + across_N[:, None] * normal
        angles_N = angle + rng.normal(0, 0.3, number)
    stray_N = rng.random(number) < 0.12
    places_N2 = np.where(stray_N[:, None], rng.uniform(0, size_pixels, (number, 2)), places_N2)
    in_tile_N = ((places_N2 > -2 * scale) & (places_N2 < size_pixels + 2 * scale)).all(axis=1)
    order = np.argsort(~in_tile_N, kind="stable")
    outside = places_N2[order][in_tile_N.sum() :]
    places_N2 = places_N2[order]
    places_N2[len(places_N2) - len(outside) :] = rng.uniform(0, size_pixels, outside.shape)
    return places_N2, angles_N[order]


def _stain_nuclei(
    nuclei: _Nuclei, attributes: TileAttributes, size_pixels: int, rng: "np.random.Generator"
) -> "np.ndarray":
    """Haematoxylin of the nuclei (H x W): chromatin is smooth, or clumped with a dark rim."""
    import numpy as np

    number = len(nuclei.places)
    half = int(nuclei.long.max() * 1.25) + 2
    grid = np.arange(-half, half + 1, dtype=np.float32)
    corners_N2 = np.round(nuclei.places).astype(int)
    offset_N2 = (nuclei.places - corners_N2).astype(np.float32)
    x_NP = grid[None] - offset_N2[:, :1]
    y_NP = grid[None] - offset_N2[:, 1:]
    cos_N, sin_N = (f(nuclei.angles).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    long_N, short_N = (item.astype(np.float32)[:, None, None] for item in (nuclei.long, nuclei.short))
    u_NPP = (x_NP[:, None, :] * cos_N + y_NP[:, :, None] * sin_N) / long_N
    v_NPP = (y_NP[:, :, None] * cos_N - x_NP[:, None, :] * sin_N) / short_N
    square_NPP = u_NPP * u_NPP + v_NPP * v_NPP
    rho_NPP = np.sqrt(square_NPP)
    dent_N = rng.normal(0, 0.06, (2, number, 1, 1)).astype(np.float32)
    wave_NPP = dent_N[0] * u_NPP * (u_NPP * u_NPP - 3 * v_NPP * v_NPP)
    wave_NPP += dent_N[1] * v_NPP * (3 * u_NPP * u_NPP - v_NPP * v_NPP)
    rho_NPP -= wave_NPP / (square_NPP * rho_NPP + 1e-3)
    cover_NPP = np.clip((1 - rho_NPP) * short_N / 1.2 + 0.5, 0, 1)
    rim_NPP = np.clip(1 - np.abs(rho_NPP - 0.85) * short_N / 1.5, 0, 1)
    strength_N = np.exp(rng.normal(0, 0.14, (number, 1, 1))).astype(np.float32)
    chromatin = attributes.chromatin
    value_NPP = cover_NPP * strength_N * (0.92 - 0.3 * chromatin + (0.15 + 0.4 * chromatin) * rim_NPP)
    rows_NPP = corners_N2[:, 1, None, None] + grid.astype(int)[None, :, None]
    columns_NPP = corners_N2[:, 0, None, None] + grid.astype(int)[None, None, :]
    inside_NPP = (rows_NPP >= 0) & (rows_NPP < size_pixels) & (columns_NPP >= 0) & (columns_NPP < size_pixels)
    inside_NPP &= cover_NPP > 0
    stained = np.zeros(size_pixels * size_pixels, dtype=np.float32)
    np.maximum.at(stained, (rows_NPP * size_pixels + columns_NPP)[inside_NPP], value_NPP[inside_NPP])
    clump_cells = max(4, round(size_pixels / (1.2 + 2.2 * chromatin)))
    clumps_HW = _make_noise(size_pixels, clump_cells, rng)
    stained_HW = stained.reshape(size_pixels, size_pixels)
    return np.clip(stained_HW * (1 + (0.08 + 0.5 * chromatin) * clumps_HW), 0, 2.2)


def _stain_ground(ground: _Ground, size_pixels: int, rng: "np.random.Generator") -> "np.ndarray":
    """Eosin (H x W): granular cytoplasm, and stroma in wavy fibres."""
    import numpy as np

    yy, xx = np.mgrid[:size_pixels, :size_pixels].astype(np.float32)
    across = xx * -math.sin(ground.fibre_angle) + yy * math.cos(ground.fibre_angle)
    wave = across + 0.03 * size_pixels * _make_noise(size_pixels, 5, rng)
    phase_HW = wave * (2 * math.pi / (0.06 * size_pixels)) + 1.6 * _make_noise(size_pixels, 9, rng)
    fibres_HW = np.sin(phase_HW) * (0.5 + 0.5 * np.clip(_make_noise(size_pixels, 10, rng), -1, 1))
    fibres_HW += 0.6 * np.sin(2.3 * phase_HW + 2 * _make_noise(size_pixels, 14, rng))
    cytoplasm = 0.42 + 0.07 * _make_noise(size_pixels, 11, rng) + 0.05 * _make_noise(size_pixels, size_pixels // 3, rng)
    stroma = 0.46 + 0.13 * fibres_HW
    return np.clip(cytoplasm + ground.stroma * (stroma - cytoplasm), 0.02, 1.2).astype(np.float32)


def _find_empty(ground: _Ground, size_pixels: int, rng: "np.random.Generator") -> "np.ndarray":
    """How empty each place is (H x W, 0 to 1): lumina, some with secretion, and tears, which any tissue may have."""
    import numpy as np

    yy, xx = np.mgrid[:size_pixels, :size_pixels].astype(np.float32)
    bumps_HW = 0.12 * _make_noise(size_pixels, 8, rng)
    empty_HW = np.zeros((size_pixels, size_pixels), dtype=np.float32)
    for x, y, radius in ground.lumina:
        distance_HW = np.sqrt((xx - x) ** 2 + (yy - y) ** 2) / (0.55 * radius) + bumps_HW
        empty_HW = np.maximum(empty_HW, float(rng.uniform(0.2, 0.95)) * np.clip((1 - distance_HW) * 6, 0, 1))
    share = max(0.0, float(rng.normal(0.0, 0.08)))
    if share:
        tears_HW = _make_noise(size_pixels, 7, rng)
        edge = np.quantile(tears_HW[::4, ::4], 1 - share)
        empty_HW = np.maximum(empty_HW, 0.9 * np.clip((tears_HW - edge) * 4, 0, 1))
    return empty_HW
