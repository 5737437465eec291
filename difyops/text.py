"""Text from templates/, where YAML is never templated. An undefined name is an error."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any


def bundled(name: str) -> Path:
    """`templates`, `compose`, `models`: below _bundled/ in the wheel, at the top of a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "_bundled" / name
    return inside if inside.is_dir() else here.parent / name


@cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(bundled("templates")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - configuration files, not HTML
    )


def render(template: str, **values: object) -> str:
    """The text of `templates/<template>.j2` with these values."""
    return str(_environment().get_template(f"{template}.j2").render(**values))
