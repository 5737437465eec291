"""The pictures of `difyops bench gpu`. matplotlib is an extra, so this is imported late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from difyops.bench.gpu import Found
from difyops.bench.gpu_model import Row

#: One colour for each model that contexts are compared over.
_COLOURS = {"linear-1b": "tab:green", "hybrid-1b": "tab:blue", "softmax-1b": "tab:red"}


def draw(found: Found, path: Path) -> None:
    """Milliseconds a token by context, a panel for each number of sequences; else the shares of the
    limit that decoding comes to."""
    # Without pyplot there is no window and no global state.
    from matplotlib.figure import Figure

    curves = [row for row in found.rows if row.unit == "context"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    if curves:
        numbers = sorted({row.facts["sequences"] for row in curves})
        panels = figure.subplots(1, len(numbers), squeeze=False)[0]
        for axes, number in zip(panels, numbers, strict=True):
            _contexts([r for r in curves if r.facts["sequences"] == number], number, axes)
        figure.suptitle(f"What a token costs behind a context, bf16 on {found.device}")
    else:
        _shares([row for row in found.rows if row.share is not None], figure.subplots())
        figure.suptitle(f"Share of the limit, bf16 on {found.device}")
    figure.savefig(path, dpi=150)


def _contexts(rows: Sequence[Row], sequences: int, axes: Any) -> None:
    for name in dict.fromkeys(row.shape for row in rows):
        own = [row for row in rows if row.shape == name and row.seconds is not None]
        axes.plot(
            [row.size for row in own], [1000 * (row.seconds or 0) for row in own], "o-",
            label=name, color=_COLOURS.get(name),
        )  # fmt: skip
    sizes = sorted({row.size for row in rows if row.size is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size // 1024}k" for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel("ms a step")
    axes.set_title(f"{sequences} sequence{'' if sequences == 1 else 's'}")
    axes.grid(alpha=0.3)
    axes.legend()


def _shares(rows: Sequence[Row], axes: Any) -> None:
    names = [f"{row.shape}, {row.work}, {row.size:,} {row.unit}" for row in rows]
    axes.barh(range(len(rows)), [row.share for row in rows])
    axes.set_yticks(range(len(rows)), names, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(0.6, color="black", linewidth=0.8)
    axes.set_xlim(0, 1)
