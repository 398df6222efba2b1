"""Report plots: small SVG pictures that take their colours from the page, so that they follow light and dark.

Goes in: estimates and exhibits. Comes out: SVG text with no address, date or random id in it. Figures are about as wide
as a phone, so that their words stay legible there. Labels are never read as markup of any kind.
"""

import io
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mint_lib.report_records import Estimate, Metric, Perturbation
from mint_lib.reporting.exhibits import Confusion, Curve
from mint_lib.statistics import ReliabilityBin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Stand-ins that are replaced by CSS variables in the finished SVG.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--rule)",
    "#040404": "var(--main)",
    "#050505": "var(--second)",
    "#060606": "var(--third)",
    "#070707": "var(--fourth)",
    "#080808": "var(--panel)",
}
INK, MUTED, RULE, MAIN, SECOND, THIRD, FOURTH, PANEL = _COLOURS
_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_WIDTH = 3.7
_HEIGHT = 2.5
_LARGE = 9
"""Labels from which a confusion needs more than a phone's width."""


def draw_intervals(metric: Metric, rows: Sequence[tuple[str, str, Estimate]]) -> str:
    """Values with intervals, one line a system; rows hold the name, its role (`main` stands out) and the estimate."""
    rows = [row for row in rows if row[2].value is not None]
    with _figure(_WIDTH, 0.62 + 0.27 * len(rows)) as (figure, axes):
        scale = 100 if metric.unit == "percent" else 1
        for place, (_, role, estimate) in enumerate(rows):
            value = (estimate.value or 0.0) * scale
            colour = MAIN if role == "main" else MUTED if role == "reference" else INK
            if estimate.low is not None and estimate.high is not None:
                ends = [estimate.low * scale, estimate.high * scale]
                axes.plot(ends, [place, place], color=colour, linewidth=1.6, solid_capstyle="round")
            axes.plot([value], [place], "o", color=colour, markersize=6.5 if role == "main" else 5)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        for label, (_, role, _) in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_color(MAIN if role == "main" else INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, _upper_limit([(row[2].high or row[2].value or 0.0) * scale for row in rows], scale))
        axes.set_xlabel(f"{metric.title} (%)" if scale == 100 else metric.title)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return _to_svg(figure, f"interval-{metric.title}")


def draw_curve(curve: Curve, *, main: str, name_of: Mapping[str, str]) -> str:
    """One figure over the training steps, a line for every run; runs of one arm share a colour."""
    arms = list(dict.fromkeys(run.partition("/")[0] for run in curve.series))
    palette = {main: MAIN} | dict(
        zip([arm for arm in arms if arm != main], [SECOND, THIRD, FOURTH, INK, MUTED] * 4, strict=False)
    )
    with _figure(_WIDTH, _HEIGHT) as (figure, axes):
        ends: list[tuple[str, float, float]] = []
        for run, points in curve.series.items():
            arm = run.partition("/")[0]
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=palette[arm], linewidth=1.8 if arm == main else 1.3, solid_joinstyle="round")
            axes.plot(steps[-1:], values[-1:], "o", color=palette[arm], markersize=3.5)
            if arm not in [name for name, _, _ in ends]:
                ends.append((arm, float(steps[-1]), float(values[-1])))
        low, high = axes.get_ylim()
        for arm, _, place in _spread(ends, least=(high - low) * 0.085):
            axes.annotate(
                name_of[arm],
                (1.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=palette[arm],
                fontsize=8.5,
            )
        axes.set_xlabel("Optimiser step")
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        return _to_svg(figure, f"curve-{curve.title}")


def draw_reliability(bins_of: Mapping[str, Sequence[ReliabilityBin]], *, main: str, name_of: Mapping[str, str]) -> str:
    """Stated against observed certainty; a dot's area grows with its number of cases."""
    from matplotlib.collections import PathCollection

    palette = {main: MAIN} | dict(
        zip([name for name in bins_of if name != main], [SECOND, THIRD, FOURTH] * 9, strict=False)
    )
    with _figure(_WIDTH, 3.1) as (figure, axes):
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        most = max((item.num_cases for bins in bins_of.values() for item in bins), default=1)
        for name, bins in bins_of.items():
            stated, observed = ([100 * getattr(item, key) for item in bins] for key in ("confidence", "accuracy"))
            sizes = [12 + 90 * item.num_cases / most for item in bins]
            axes.scatter(
                stated,
                observed,
                s=sizes,
                color=palette[name],
                edgecolors=PANEL,
                linewidths=0.8,
                label=name_of[name],
                zorder=3,
            )
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("Stated certainty of the first answer (%)")
        axes.set_ylabel("Right (%)")
        axes.grid(color=RULE, linewidth=0.6)
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 3}
        legend = axes.legend(**place, frameon=False, fontsize=8.5, handletextpad=0.1, columnspacing=1.0, borderpad=0)
        for handle in legend.legend_handles:
            if isinstance(handle, PathCollection):
                handle.set_sizes([28])
        return _to_svg(figure, "reliability")


def draw_perturbation(item: Perturbation, names: Sequence[str], *, chance: float) -> str:
    """Top-1 with intervals as images get worse; `names` say the levels. The dashed line is chance."""
    points = [item.top_1, *(level.top_1 for level in item.levels)]
    with _figure(_WIDTH, _HEIGHT) as (figure, axes):
        places = list(range(len(points)))
        lows = [100 * (value.low if value.low is not None else value.value or 0.0) for value in points]
        highs = [100 * (value.high if value.high is not None else value.value or 0.0) for value in points]
        axes.fill_between(places, lows, highs, color=MAIN, alpha=0.15, linewidth=0)
        axes.plot(places, [100 * (value.value or 0.0) for value in points], "o-", color=MAIN, linewidth=1.8)
        axes.axhline(100 * chance, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.annotate("chance", (0.0, 100 * chance), (0, 3), textcoords="offset points", color=MUTED, fontsize=8.5)
        axes.set_xticks(places, ["as it is", *names])
        axes.set_ylim(0, _upper_limit(highs, 100))
        axes.set_ylabel("Top-1 (%)")
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        return _to_svg(figure, f"perturbation-{item.kind}")


def is_large(confusion: Confusion) -> bool:
    """Whether a confusion's picture is wider than a phone."""
    return len(confusion.names) >= _LARGE


def draw_confusion(confusion: Confusion) -> str:
    """Rows are labels, columns what is ranked first; the share within a row shades its field."""
    size = len(confusion.names)
    width = 1.9 + 0.34 * size if is_large(confusion) else _WIDTH
    has_others = any(len(counts) > size for counts in confusion.counts)
    with _figure(width, 0.7 + 0.34 * size) as (figure, axes):
        for row, counts in enumerate(confusion.counts):
            total = sum(counts) or 1.0
            for column, count in enumerate(counts):
                colour = MAIN if column == row else SECOND
                if count:
                    alpha = 0.15 + 0.85 * count / total
                    axes.add_patch(_rectangle(column, row, colour, alpha))
                    text_colour = PANEL if alpha > 0.55 else INK
                    axes.text(column, row, f"{count:g}", ha="center", va="center", fontsize=9, color=text_colour)
                else:
                    axes.text(column, row, "·", ha="center", va="center", color=RULE)
        axes.set_xlim(-0.5, size - 0.5 + has_others)
        axes.set_ylim(size - 0.5, -0.5)
        axes.set_xticks(range(size + has_others), [*_LETTERS[:size], *(["other"] if has_others else [])])
        names = [f"{_shorten(name)}   {letter}" for name, letter in zip(confusion.names, _LETTERS, strict=False)]
        axes.set_yticks(range(size), names)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return _to_svg(figure, f"confusion-{confusion.family}")


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple["Figure", "Axes"]]:
    """A figure of our style. It belongs to no window system and leaves matplotlib's settings as they were."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mint",
        "text.parse_math": False,
        "font.size": 9.5,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": MUTED,
        "axes.linewidth": 0.7,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": INK,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.add_subplot()


def _to_svg(figure: "Figure", name: str) -> str:
    """`figure` as an SVG element whose ids begin with `name` and whose colours are the page's."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in _COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)


def _rectangle(column: int, row: int, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.47, row - 0.45), 0.94, 0.9, facecolor=colour, alpha=alpha, edgecolor="none")


def _spread(ends: Sequence[tuple[str, float, float]], *, least: float) -> list[tuple[str, float, float]]:
    """The labels at the curves' ends, moved upwards until they do not overlap."""
    placed: list[tuple[str, float, float]] = []
    for name, step, value in sorted(ends, key=lambda end: end[2]):
        placed.append((name, step, max(value, placed[-1][2] + least) if placed else value))
    return placed


def _upper_limit(values: Sequence[float], scale: int) -> float:
    return min(1.04 * scale, 1.12 * max([*values, 0.05 * scale]))


def _shorten(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1].rstrip() + "…"
