"""The common look of the figures."""

from __future__ import annotations

from matplotlib.axes import Axes


def tidy(axes: Axes) -> None:
    """Draw a grid below the data, and no frame on the sides without an axis."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
