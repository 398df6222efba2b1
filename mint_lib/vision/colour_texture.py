"""Figures that describe a tile without a network: its colours alone, or its texture and nuclei.

Goes in: RGB bytes. Comes out: one vector of fixed length. Colours know no places, so a model on them cannot see
morphology; texture is read from the haematoxylin stain at unit contrast, so how strongly a laboratory stains says
little in it. What a figure means for a tissue is not known here.
"""

import numpy as np

_NUM_COLOUR_BINS = 8
_MAX_OPTICAL_DENSITY = 2.0
"""Densities above it, one hundredth of the light and less, share the last bin."""
_LBP_CIRCLES = ((8, 1), (16, 2), (24, 3))
"""Points and radius in pixels of the local binary patterns (Ojala et al., TPAMI 2002, table 2)."""
_GLCM_LEVELS = 32
_GLCM_DISTANCES = (1, 2, 4, 8)
_GLCM_ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
_GLCM_PROPERTIES = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation")
_CLIPPED_PERCENT = 1
_MIN_NUCLEUS_SHARE = 1e-3
"""Spots below this share of the tile are no nuclei."""


def describe_colours(tile_CHW: np.ndarray) -> np.ndarray:
    """Mean, deviation and histogram of the optical density of each channel: `[3 * (2 + 8)]`.

    Stains absorb light in proportion to their amount in optical density (Beer and Lambert; Ruifrok and Johnston 2001).
    """
    density_CN = -np.log((tile_CHW.reshape(3, -1).astype(np.float64) + 1) / 256)
    figures = []
    for density_N in density_CN:
        counts, _ = np.histogram(
            np.minimum(density_N, _MAX_OPTICAL_DENSITY), bins=_NUM_COLOUR_BINS, range=(0, _MAX_OPTICAL_DENSITY)
        )
        figures.append(np.concatenate([[density_N.mean(), density_N.std()], counts / len(density_N)]))
    return np.concatenate(figures)


def describe_texture(tile_CHW: np.ndarray) -> np.ndarray:
    """Local binary patterns, co-occurrences and simple nucleus statistics of the haematoxylin stain.

    Sources: Ruifrok and Johnston 2001 (stains), Ojala et al. 2002 (patterns), Haralick et al. 1973 (co-occurrences),
    Otsu 1979 (what is a nucleus).
    """
    from skimage.color import rgb2hed
    from skimage.feature import graycomatrix, graycoprops, local_binary_pattern

    stain_HW = rgb2hed(tile_CHW.transpose(1, 2, 0))[..., 0]
    low, high = np.percentile(stain_HW, (_CLIPPED_PERCENT, 100 - _CLIPPED_PERCENT))
    grey_HW = np.clip((stain_HW - low) / max(high - low, 1e-6), 0, 1)
    bytes_HW = np.rint(grey_HW * 255).astype(np.uint8)
    figures = []
    for num_points, radius in _LBP_CIRCLES:
        patterns = local_binary_pattern(bytes_HW, num_points, radius, method="uniform")
        figures.append(np.bincount(patterns.astype(int).ravel(), minlength=num_points + 2) / patterns.size)
    levels = (bytes_HW // (256 // _GLCM_LEVELS)).astype(np.uint8)
    matrix = graycomatrix(levels, _GLCM_DISTANCES, _GLCM_ANGLES, levels=_GLCM_LEVELS, symmetric=True, normed=True)
    figures += [graycoprops(matrix, name).mean(axis=1) for name in _GLCM_PROPERTIES]
    figures.append(_describe_nuclei(grey_HW))
    return np.concatenate(figures)


def _describe_nuclei(grey_HW: np.ndarray) -> np.ndarray:
    """Figures of the spots above Otsu's threshold; zeros where there are none.

    Share of the tile that is nuclei, their number, and mean and deviation of area, eccentricity, solidity, stain and
    distance to the next one. Nuclei that touch count as one. Lengths are shares of the tile's side.
    """
    from scipy.ndimage import binary_fill_holes, binary_opening, gaussian_filter
    from scipy.spatial import cKDTree
    from skimage.filters import threshold_otsu
    from skimage.measure import label, regionprops

    smooth_HW = gaussian_filter(grey_HW, 1)
    if smooth_HW.max() - smooth_HW.min() < 1e-6:
        return np.zeros(12)
    mask_HW = binary_fill_holes(binary_opening(smooth_HW > threshold_otsu(smooth_HW)))
    regions = regionprops(label(mask_HW), intensity_image=grey_HW)
    nuclei = [region for region in regions if region.area >= _MIN_NUCLEUS_SHARE * grey_HW.size]
    if not nuclei:
        return np.zeros(12)
    centres = np.array([region.centroid for region in nuclei])
    gaps = cKDTree(centres).query(centres, k=2)[0][:, 1] if len(nuclei) > 1 else np.ones(1) * len(grey_HW)
    columns = (
        np.array([region.area for region in nuclei]) / grey_HW.size,
        np.array([region.eccentricity for region in nuclei]),
        np.array([region.solidity for region in nuclei]),
        np.array([region.intensity_mean for region in nuclei]),
        gaps / len(grey_HW),
    )
    moments = [moment for column in columns for moment in (column.mean(), column.std())]
    return np.array([mask_HW.mean(), len(nuclei), *moments])
