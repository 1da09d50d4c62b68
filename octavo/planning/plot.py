"""A picture of a plan: memory of a run against the batch and against the context, a line for each scheme."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import OctavoError
from .sizes import Unit
from .table import Planner

POINTS = 24
MOST_BATCHES = 48


def _pyplot() -> Any:
    """Matplotlib, drawing into files.

    Raises:
        OctavoError: it is not there.
    """
    try:
        import matplotlib
    except ImportError:
        raise OctavoError("--plot: needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def series(
    planner: Planner, names: Sequence[str], context: int, batch: int
) -> dict[str, tuple[list[int], dict[str, list[int]]]]:
    """Bytes of a run's peak: by "sequences" and by "tokens", the numbers of them and what each scheme takes.

    Args:
        context: of each sequence, where their number changes; the tokens go up to twice as many.
        batch: sequences, where their tokens do.
    """
    batches = list(range(1, MOST_BATCHES + 1))
    contexts = sorted({max(1, 2 * context * step // POINTS) for step in range(1, POINTS + 1)})
    return {
        "sequences": (batches, {n: [planner.peak(n, context, b).total for b in batches] for n in names}),
        "tokens": (contexts, {n: [planner.peak(n, c, batch).total for c in contexts] for n in names}),
    }


def draw(
    file: Path, planner: Planner, names: Sequence[str], context: int, batch: int, memory: int | None, unit: Unit
) -> None:
    """Draw a plan into a file, whose ending says the kind: svg, png or pdf.

    Raises:
        OctavoError: there is no matplotlib, or the file cannot be written.
    """
    pyplot = _pyplot()
    titles = {"sequences": f"{context:,} tokens each", "tokens": f"batch {batch}"}
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axis, (what, (numbers, lines)) in zip(axes, series(planner, names, context, batch).items(), strict=True):
        for name, values in lines.items():
            axis.plot(numbers, [value / unit.bytes for value in values], label=name)
        if memory is not None:
            axis.axhline(memory / unit.bytes, color="black", linestyle="--", linewidth=1, label=unit.text(memory))
        axis.set(xlabel=what, ylabel=f"peak of a run, {unit.name}", title=titles[what], ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.suptitle(planner.model.name)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise OctavoError(
            f"--plot {file}: cannot be written ({error}); name a file that ends in .svg or .png"
        ) from None
    finally:
        pyplot.close(figure)
