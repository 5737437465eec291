"""What can be said of the values of a schema that schema.py has read, without a value at hand."""

from __future__ import annotations

from typing import Any

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def types_of(schema: dict[str, Any]) -> set[str]:
    """The types a value may have, `integer` counted as `number`."""
    given = schema.get("type", list(TYPES))
    types = {
        "number" if t == "integer" else t for t in (given if isinstance(given, list) else [given])
    }
    values = literals(schema)
    return types if values is None else types & {_type_of(v) for v in values}


def _type_of(value: Any) -> str:
    names: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "string"}
    names |= {list: "array", dict: "object"}
    return names.get(type(value), "null")


def literals(schema: dict[str, Any]) -> list[Any] | None:
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
