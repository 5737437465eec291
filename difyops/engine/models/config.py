"""config.json: read with a schema, refused by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from difyops.errors import UsageError

C = TypeVar("C", bound=BaseModel)


def read(schema: type[C], raw: Mapping[str, Any], *, under: str = "") -> C:
    """`raw` as `schema` understands it. `under` is where it lies in the file.

    Raises UsageError naming the first key that cannot be honoured, its value and what could be.
    """
    try:
        return schema.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise UsageError(f"config.json: {under}{message}", _REMEDY) from error
        key = under + ".".join(map(str, first["loc"]))
        plain = isinstance(first["input"], str | int | float) and first["type"] != "missing"
        value = f"{first['input']!r}: " if plain else ""
        raise UsageError(f"config.json: {key}: {value}{message}", _REMEDY) from error


_REMEDY = "this model needs something that its family is not served with; choose another checkpoint"
