"""The set-up of the studies' plots."""

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_panels(size: tuple[float, float], count: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, row by row.

    Args:
        size: Width and height of the figure in inches.
        count: Number of panels in a row.
        rows: Number of rows.
    """
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = [figure.add_subplot(rows, count, i + 1) for i in range(rows * count)]
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def legend_above(figure: Figure, axes: Axes) -> None:
    """Name what one of the panels shows above all of them, where the legend hides no point."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8)
