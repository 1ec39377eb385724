"""One picture of a report: horizontal bars of its ratios, on a logarithmic axis. Needs matplotlib."""

from pathlib import Path

import matplotlib

from bench.report import Report

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(report: Report, path: Path) -> None:
    """Write a PNG with one panel for each of the report's plotted columns."""
    panels = list(report.plotted)
    height = 1.2 + 0.32 * len(report.rows)
    drawing, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels) + 2, height), sharey=True, squeeze=False)
    for axis, column in zip(axes[0], panels, strict=True):
        index = list(report.columns).index(column)
        values = [(row[index] or 0.0) for row in report.rows.values()]
        colours = ["tab:orange" if name.startswith("resilient") else "tab:gray" for name in report.rows]
        axis.barh(list(report.rows), values, color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(column, fontsize=9)
        axis.set_xscale("log")
        axis.invert_yaxis() if axis is axes[0][0] else None
    drawing.suptitle(report.title, fontsize=10)
    drawing.tight_layout()
    drawing.savefig(path, dpi=120)
    pyplot.close(drawing)
