"""docs/settings.md, docs/cli.md and docs/doctor.md, made from the code: `make docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from difyops import files, settings

_MADE = "<!-- Made by `make docs`. -->\n"


def pages() -> dict[str, str]:
    """File name -> text of every generated page."""
    from difyops import checks

    return {
        "settings.md": settings_markdown(),
        "cli.md": cli_markdown(),
        "doctor.md": checks.table(),
    }


# --- difyops.yaml ---------------------------------------------------------------------------------


def settings_markdown() -> str:
    """Every key of difyops.yaml: its type or choices, default and description."""
    intro = (
        "# difyops.yaml\n\n"
        f"{_MADE}\n"
        "Every key is optional; an empty file means all defaults. A key that is not listed here is "
        "an error.\nSecrets never stand in this file: they are in `secrets.env`.\n"
    )
    alone, sections = [], []
    for name, field in settings.Settings.model_fields.items():
        model = _section(field.annotation)
        if model is None:
            alone.append(_row(name, field))
            continue
        about = f"\n{field.description}\n" if field.description else ""
        rows = (_row(f"{name}.{key}", f) for key, f in model.model_fields.items())
        sections.append(f"\n## {name}\n{about}\n{_table(rows)}")
    return f"{intro}\n{_table(alone)}{''.join(sections)}"


def _table(rows: Iterable[str]) -> str:
    return "| key | value | default | |\n|---|---|---|---|\n" + "".join(rows)


def _row(key: str, field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    cells = (f"`{key}`", _kind(field), _plain(default), field.description or "")
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |\n"


def _section(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _kind(field: FieldInfo) -> str:
    """The type in words, with the bounds of a number."""
    annotation: Any = field.annotation
    bounds = list(field.metadata)
    for option in get_args(annotation):
        # Optional[Annotated[int, …]] keeps the bounds inside.
        for info in getattr(option, "__metadata__", ()):
            bounds += getattr(info, "metadata", [])
            annotation = get_args(option)[0]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    options = [o for o in get_args(annotation) if o is not type(None)]
    if get_origin(annotation) in (list, dict):
        return "list of text" if get_origin(annotation) is list else "names and texts"
    plain = options[0] if options else annotation
    word = {str: "text", int: "number", bool: "`true`, `false`"}[plain]
    low = next((b.ge for b in bounds if hasattr(b, "ge")), None)
    high = next((b.le for b in bounds if hasattr(b, "le")), None)
    if low is not None and high is not None:
        return f"{word}, {low} to {high}"
    return word if low is None else f"{word}, {low} or more"


def _plain(value: Any) -> str:
    if value is None or value == {}:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return ", ".join(f"`{entry}`" for entry in value)
    return f"`{value}`"


# --- the command line -----------------------------------------------------------------------------


def cli_markdown() -> str:
    """The help of every command. Not click's own layout, which differs between its versions."""
    import typer.main

    from difyops.cli import app

    root = typer.main.get_command(app)
    parts = [
        "# Commands\n\n",
        _MADE,
        "\nThe payload goes to stdout; progress and errors go to stderr. Exit codes: 0 fine, 1 "
        "failed or\nunhealthy, 2 usage or a wrong setting, 3 could not start, 130 and 143 ended by "
        "a signal.\n",
        *_help(root, "difyops"),
    ]
    return "".join(parts)


def _help(command: Any, name: str) -> Iterable[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    children = getattr(command, "commands", {})
    words = [name, *(["[OPTIONS]"] if options else []), *map(_argument, arguments)]
    yield f"\n## {name}\n\n{command.help}\n\n"
    yield f"```\n{' '.join([*words, *(['COMMAND'] if children else [])])}\n```\n"
    if arguments or options:
        yield "\n| | |\n|---|---|\n"
    for argument in arguments:
        yield _entry(_argument(argument), argument)
    for option in options:
        names = ", ".join([*option.opts, *option.secondary_opts])
        takes = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
        yield _entry(f"{names}{takes}", option)
    if command.epilog:
        label, _, examples = command.epilog.partition(": ")
        yield f"\n{label}:\n\n```\n" + examples.replace(" | ", "\n") + "\n```\n"
    for child, inner in children.items():
        yield from _help(inner, f"{name} {child}")


def _argument(argument: Any) -> str:
    word = (argument.metavar or argument.name.upper()).strip("[]")
    several = f"{word}..." if argument.nargs == -1 else word
    return several if argument.required else f"[{several}]"


def _entry(name: str, parameter: Any) -> str:
    default = parameter.default
    shown = isinstance(default, int | str | Path) and not isinstance(default, bool)
    note = f" Default: `{default}`." if shown and str(default) != "." else ""
    # Markdown looks for cells before it looks for code.
    named = name.replace("|", "\\|")
    return f"| `{named}` | {_cell((parameter.help or '') + note)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("docs")
    for name, content in pages().items():
        files.write_atomic(folder / name, content)


if __name__ == "__main__":
    main()
