"""What can be said of the values of a schema without a value at hand.

All but `resolve` and `Types` expect a schema that schema.py has read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import unquote

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANY: frozenset[str] = frozenset(TYPES)
_NAMES: dict[type, str] = {
    bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object",
}  # fmt: skip
_MAX_DEPTH = 32


def types_of(schema: Mapping[str, Any]) -> set[str]:
    """The types a value may have by `type`, `const` and `enum`, `integer` counted as `number`."""
    return {"number" if t == "integer" else t for t in _own_types(schema)}


def _own_types(schema: Mapping[str, Any]) -> frozenset[str]:
    """Of any object: what has not the shape that it should have constrains nothing."""
    found, given = ANY, schema.get("type")
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list) and names and all(isinstance(n, str) and n in ANY for n in names):
        found = frozenset(names) | ({"integer"} if "number" in names else set())
    values = literals(schema)
    return found if not isinstance(values, list) else found & _union(map(value_types, values))


def _union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def value_types(value: Any) -> frozenset[str]:
    """A whole number is an `integer` and a `number`, whether or not it is written with a point."""
    name = _type_of(value)
    whole = name == "number" and value == value // 1
    return frozenset({name, "integer"} if whole else {name})


def _type_of(value: Any) -> str:
    return _NAMES.get(type(value), "null")


def resolve(root: Any, pointer: str) -> Any:
    """What a JSON pointer (RFC 6901) leads to. Raises LookupError."""
    found = root
    for raw in pointer.split("/")[1:]:
        part = raw.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and part.isdecimal() and len(part) < 10:
            found = found[int(part)]
        elif isinstance(found, Mapping):
            found = found[part]
        else:
            raise LookupError(pointer)
    return found


class Types:
    """Reads the types of the values of parts of `root`, a schema that nobody has checked.

    `budget` is how many subschemas are looked at in all. Past it, and for whatever has not the
    shape that it should have, all types are possible.
    """

    def __init__(self, root: Any, budget: int) -> None:
        self._root = root
        self.budget = budget
        self._referred: dict[str, frozenset[str]] = {}

    def of(self, schema: Any, depth: int = 0) -> frozenset[str]:
        """An `integer` is no `number` here that may have a fraction; a number may be an integer."""
        self.budget -= 1
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH or self.budget < 0:
            return ANY
        found = _own_types(schema)
        for keyword in ("anyOf", "oneOf"):
            options = schema.get(keyword)
            if isinstance(options, list) and options:
                found &= _union(self.of(option, depth + 1) for option in options)
        reference = schema.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            found &= self._target(unquote(reference[1:]), depth + 1)
        return found

    def _target(self, pointer: str, depth: int) -> frozenset[str]:
        if pointer not in self._referred:
            self._referred[pointer] = ANY  # for a reference that leads back to itself
            try:
                target = resolve(self._root, pointer)
            except LookupError:
                return ANY
            self._referred[pointer] = self.of(target, depth)
        return self._referred[pointer]


def literals(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values: list[Any] | None = schema.get("enum")
    return values


def equal(a: Any, b: Any) -> bool:
    # Python calls some lists equal that differ in JSON ([true] and [1]): too careful is safe.
    return bool(a == b) if _type_of(a) == _type_of(b) else False


def finite(schema: Any, known: set[str]) -> bool:
    """Whether a value can end, given the definitions that can."""
    if not isinstance(schema, dict):
        return bool(schema)
    if "$ref" in schema and schema["$ref"].removeprefix("#/$defs/") not in known:
        return False
    if not all(finite(s, known) for s in schema.get("allOf", ())):
        return False
    for keyword in ("anyOf", "oneOf"):
        if keyword in schema and not any(finite(s, known) for s in schema[keyword]):
            return False
    types = types_of(schema)
    if types - {"array", "object"} or "const" in schema or "enum" in schema:
        return True
    return ("object" in types and _finite_object(schema, known)) or (
        "array" in types and _finite_array(schema, known)
    )


def _finite_object(schema: dict[str, Any], known: set[str]) -> bool:
    properties, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    if not all(finite(properties.get(name, rest), known) for name in schema.get("required", ())):
        return False
    if schema.get("minProperties", 0) <= len(schema.get("required", ())):
        return True
    others = [*properties.values(), *schema.get("patternProperties", {}).values(), rest]
    return any(finite(s, known) for s in others)


def _finite_array(schema: dict[str, Any], known: set[str]) -> bool:
    least, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])
    needed = prefix[:least] + ([schema.get("items", True)] if least > len(prefix) else [])
    return all(finite(s, known) for s in needed)
