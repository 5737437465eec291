"""YAML as a person means it: what YAML 1.1 quietly reads as something else is an error.

A key given twice, an alias, `05001` (octal) and `80:90` (sexagesimal) are refused, with their line.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from difyops.errors import UsageError

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})\Z")


def load(text: str, source: str) -> Any:
    """The one document in `text`; `source` is named in errors. Raises UsageError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        raise UsageError(
            f"{source}:{where} {error.problem or 'not YAML'}", error.note or "mend the YAML there"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(
            f"{source}: line {line}: the character U+{error.character:04X} cannot stand in YAML",
            "remove it",
        ) from None
    except RecursionError:
        raise UsageError(f"{source}: nested too deeply", "two levels are all there are") from None


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise _error("aliases are not read here", mark, "write the value out")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key should be one word", key.start_mark, "mend the YAML there")
            if key.value in seen:
                raise _error(
                    f"`{key.value}` is there twice (first in line {seen[key.value]})",
                    key.start_mark,
                    "keep one of the two",
                )
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        if not _DECIMAL.match(node.value):
            raise _error(
                f"{node.value[:40]} is not a plain decimal number, and YAML would read another",
                node.start_mark,
                f'write {node.value.lstrip("0")} for a number, "{node.value}" for text'
                if node.value.isdigit()
                else f'write "{node.value}" for text, or a plain number',
            )
        return int(node.value)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


def _error(problem: str, mark: yaml.Mark, remedy: str) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(problem=problem, problem_mark=mark, note=remedy)
