"""The picture of `difyops bench spec`. matplotlib is an extra, so this is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from difyops.bench.spec import Found
from difyops.errors import PrerequisiteError, UsageError

SUFFIXES = (".png", ".svg")


def check(path: Path) -> None:
    """Before anything is measured. Raises UsageError for another kind of picture or a folder that
    is not there, PrerequisiteError without matplotlib."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot: {path.name} is neither .png nor .svg", "such as spec.png")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot: no directory {path.absolute().parent}", "make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PrerequisiteError(
            "--plot needs matplotlib, which is not installed", "pip install 'difyops[plot]'"
        ) from None


def draw(found: Found, path: Path) -> None:
    """Tokens a second by mode, as ratios to off; beside it the time to first token by turn."""
    # Without pyplot there is no window and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speeds, turns = figure.subplots(1, 2)
    _speeds(found, speeds)
    _turns(found, turns)
    figure.suptitle(f"{found.wanted.model}, {found.dtype} on {found.device}")
    figure.savefig(path, dpi=150)


def _speeds(found: Found, axes: Any) -> None:
    names = list(dict.fromkeys(row.mode for row in found.rows))
    levels = list(dict.fromkeys(row.streams for row in found.rows))
    high = 0.8 / len(levels)
    for i, streams in enumerate(levels):
        rows = [row for row in found.rows if row.streams == streams]
        places = [names.index(row.mode) + i * high for row in rows]
        label = f"{streams} stream{'' if streams == 1 else 's'}"
        axes.barh(places, [found.speedup(row) for row in rows], height=high, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([k + (len(levels) - 1) * high / 2 for k in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s, off = 1")
    axes.set_title("Speculation")
    # Below the axes: inside it would hide bars.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(levels), frameon=False)


def _turns(found: Found, axes: Any) -> None:
    numbers = range(1, len(found.turns) + 1)
    axes.plot(numbers, [t.without * 1000 for t in found.turns], "o-", label="without")
    axes.plot(numbers, [t.cached * 1000 for t in found.turns], "o-", label="with prefix cache")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("turn")
    axes.set_ylabel("time to first token, ms")
    axes.set_title("A conversation")
    axes.legend()
