"""JSON Schema -> the part of it that llguidance enforces; all else is refused by name.

llguidance skips some keywords in silence, lets a few values through that the schema forbids (the
29th of February in any year, integers above 2**53 rounded, a key counted twice), and takes options
out of the schema itself. Here every keyword is handed on in a form that is enforced, or an error.
Reference: JSON Schema draft 2020-12; the drafts 4 to 2019-09 where they say the same.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from difyops.engine.schemafacts import TYPES, equal, finite, literals, resolve, types_of

MAX_BYTES = 128 * 1024
MAX_DEPTH = 64
MAX_NAMES = 1000
#: Levels of the schema and of everything it refers to, together. llguidance follows references by
#: recursion, and a thread's stack of 8 MiB ends near 1,700 levels: the process would die.
MAX_LEVELS = 800
#: Branches of a oneOf; each is compared with each.
MAX_COMPARED = 100
#: Subschemas and values compared for all the oneOfs of a schema, about a fifth of a second.
MAX_COMPARISONS = 100_000
#: Integers up to here are exact in float64, which is what llguidance computes in.
MAX_INTEGER = 2**53

#: They constrain nothing. Extensions of the form `x-…` belong here, too.
ANNOTATIONS = frozenset(
    {"$schema", "$id", "id", "$comment", "$anchor", "$defs", "definitions", "title", "description"}
    | {"default", "examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"}
    | {"contentEncoding", "contentMediaType", "contentSchema"}
)
_DRAFT = re.compile(
    r"https?://json-schema\.org/(draft-04|draft-06|draft-07|draft/2019-09|draft/2020-12)/"
)
_NATIVE_FORMATS = frozenset({"duration", "email", "ipv4", "ipv6", "uri", "uuid"})
_MONTH_DAY = (
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_LEAP_YEAR = r"(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = rf"(?:[1-9][0-9]{{3}}-{_MONTH_DAY}|{_LEAP_YEAR}-02-29)"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?"
    r"(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
#: Where llguidance's own expressions are too wide: no 29 February in other years, no leap seconds.
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
#: OpenAPI's formats of numbers, as bounds; int64 is cut to what llguidance computes without error.
_NUMBER_FORMATS: dict[str, tuple[int, int] | None] = {
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**62), 2**62),
    "float": None,
    "double": None,
}
#: Rust's regular expressions read these in a character class as set operations; ECMA 262 does not.
_SET_OPERATION = re.compile(r"\[[^\]]*(?:&&|--|~~|\[)")
_UNREPRESENTABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


class UnsupportedSchema(ValueError):
    """A keyword, or the value of one, that would not be enforced. `pointer` is its JSON pointer."""

    def __init__(self, pointer: str, keyword: str, reason: str = "is not supported") -> None:
        super().__init__(f"schema at '#{pointer}': {keyword} {reason}")
        self.pointer = pointer
        self.keyword = keyword
        self.reason = reason

    def inside(self, place: str) -> UnsupportedSchema:
        """The same, of a schema that stands at `place` in something larger."""
        return UnsupportedSchema(place + self.pointer, self.keyword, self.reason)


def normalise(
    schema: Any, prefix: str = "", *, root: Any = None, at: str = ""
) -> tuple[Any, dict[str, Any]]:
    """What llguidance is given: the schema, and its `$defs` (their names begin with `prefix`).

    `root` and `at` are for a part of a larger schema: that one, and where in it the part stands.
    Raises UnsupportedSchema naming the first keyword or value that cannot be enforced.
    """
    try:
        size = len(json.dumps(schema, ensure_ascii=False, allow_nan=False).encode())
    except RecursionError:
        raise UnsupportedSchema("", "schema", f"is nested deeper than {MAX_DEPTH} levels") from None
    except (TypeError, ValueError) as error:
        raise UnsupportedSchema("", "schema", f"is not JSON: {error}") from None
    if size > MAX_BYTES:
        raise UnsupportedSchema("", "schema", f"has {size} bytes; {MAX_BYTES} are accepted")
    reader = _Reader(schema if root is None else root, prefix)
    return reader.whole(schema, at), reader.defs


def reachable(schema: Any) -> list[tuple[str, dict[str, Any]]]:
    """A schema that normalise takes, and all inside it that counts, each with its JSON pointer.

    The outer ones come first, and definitions that nothing refers to not at all.
    """
    reader = _Reader(schema, "")
    reader.whole(schema, "")
    found = dict(_walk(schema, ""))
    for pointer in list(reader.targets):
        found.update(_walk(reader.targets[pointer], pointer))
    return list(found.items())


def _walk(schema: Any, at: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    yield at, schema
    for keyword, value in schema.items():
        where = f"{at}/{escape(keyword)}"
        if keyword in ("properties", "patternProperties"):
            for name, one in value.items():
                yield from _walk(one, f"{where}/{escape(name)}")
        elif keyword in ("allOf", "anyOf", "oneOf", "prefixItems", "items") and isinstance(
            value, list
        ):
            for i, one in enumerate(value):
                yield from _walk(one, f"{where}/{i}")
        elif keyword in ("items", "additionalItems", "additionalProperties"):
            yield from _walk(value, where)


def escape(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Reader:
    """One walk over one document; `defs` fills with what its references mean."""

    def __init__(self, root: Any, prefix: str) -> None:
        self.root = root
        self.prefix = prefix
        self.defs: dict[str, Any] = {}
        self.targets: dict[str, Any] = {}  # what references mean, by JSON pointer
        self._names: dict[str, str] = {}  # the same pointers -> names in defs
        self._unread: list[tuple[str, str]] = []
        self._one_ofs: list[dict[str, Any]] = []
        self._compared: dict[tuple[int, int], bool] = {}  # pairs of ids of what was read
        self._budget = MAX_COMPARISONS
        self._deepest = 0
        self._levels = 0
        self._old = self._is_old_draft(root)

    @staticmethod
    def _is_old_draft(root: Any) -> bool:
        declared = root.get("$schema") if isinstance(root, dict) else None
        if declared is None:
            return False
        draft = _DRAFT.match(declared) if isinstance(declared, str) else None
        if draft is None:
            raise UnsupportedSchema("/$schema", "$schema", f"{declared!r} is not a known draft")
        return draft[1] != "draft/2020-12"

    def whole(self, schema: Any, at: str) -> Any:
        """`schema` and, into `defs`, everything it refers to."""
        result = self._read_all(schema, at)
        while self._unread:  # not by recursion: references may chain
            name, pointer = self._unread.pop()
            self.defs[name] = self._read_all(self.targets[pointer], pointer)
        self._check_finite()  # first: what leads only to itself is not to be compared
        for out in self._one_ofs:
            self._relax(out)
        return result

    def _read_all(self, schema: Any, at: str) -> Any:
        self._deepest = 0
        result = self.read(schema, at, 0)
        self._levels += self._deepest + 1
        if self._levels > MAX_LEVELS:
            raise UnsupportedSchema(at, "$ref", f"leads to more than {MAX_LEVELS} levels in all")
        return result

    def read(self, schema: Any, at: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise UnsupportedSchema(at, "schema", "must be an object or a boolean")
        if depth > MAX_DEPTH:
            raise UnsupportedSchema(at, "schema", f"is nested deeper than {MAX_DEPTH} levels")
        self._deepest = max(self._deepest, depth)
        out: dict[str, Any] = {}
        for keyword, value in schema.items():
            where = f"{at}/{escape(keyword)}"
            if keyword in ("$id", "id") and at and "$ref" not in schema:
                raise UnsupportedSchema(where, keyword, "is supported at the root only")
            if keyword in ANNOTATIONS or (keyword.startswith("x-") and keyword != "x-guidance"):
                continue
            handler = _HANDLERS.get(keyword)
            if handler is None:
                raise UnsupportedSchema(where, keyword)
            handler(self, out, schema, keyword, value, where, depth + 1)
        return out

    # Applicators

    def _ref(self, out: Any, schema: Any, keyword: str, value: Any, at: str, depth: int) -> None:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise UnsupportedSchema(at, keyword, f"{value!r} is not inside this schema ('#/…')")
        pointer = unquote(value[1:])
        if pointer not in self._names:
            name = self._names[pointer] = f"{self.prefix}{len(self._names)}"
            self.targets[pointer] = self._resolve(pointer, at)
            self._unread.append((name, pointer))
        out["$ref"] = f"#/$defs/{self._names[pointer]}"

    def _resolve(self, pointer: str, at: str) -> Any:
        try:
            return resolve(self.root, pointer)
        except LookupError:
            raise UnsupportedSchema(at, "$ref", f"'#{pointer}' does not exist") from None

    def _subschema(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        out[keyword] = self.read(value, at, n)

    def _subschemas(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        options = [
            self.read(s, f"{at}/{i}", n) for i, s in enumerate(_filled_list(keyword, value, at))
        ]
        if keyword == "oneOf":
            self._one_ofs.append(out)
        # What was put there by another keyword stays.
        out[keyword] = [*out.get(keyword, ()), *options]

    def _named(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        if not isinstance(value, dict):
            raise UnsupportedSchema(at, keyword, "must be an object of schemas")
        if len(value) > MAX_NAMES:
            raise UnsupportedSchema(
                at, keyword, f"has {len(value)} names; {MAX_NAMES} are accepted"
            )
        for name in value:
            if keyword == "patternProperties":
                _check_pattern(keyword, name, f"{at}/{escape(name)}")
            elif _UNREPRESENTABLE.search(name):
                raise UnsupportedSchema(
                    at, keyword, f"has the name {name!r} with a control character"
                )
        out[keyword] = {k: self.read(s, f"{at}/{escape(k)}", n) for k, s in value.items()}

    def _items(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        if not isinstance(value, list):
            if self._old and "prefixItems" in schema:
                raise UnsupportedSchema(at, keyword, "beside prefixItems is of draft 2020-12 only")
            out["items"] = self.read(value, at, n)
            return
        if not self._old:
            raise UnsupportedSchema(
                at, keyword, "must be one schema; draft 2020-12 says prefixItems"
            )
        out["prefixItems"] = [self.read(s, f"{at}/{i}", n) for i, s in enumerate(value)]

    def _additional_items(
        self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int
    ) -> None:
        if not self._old:
            raise UnsupportedSchema(at, keyword, "is not of draft 2020-12: use items")
        if isinstance(schema.get("items"), list):
            out["items"] = self.read(value, at, n)

    # Assertions

    def _type(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        types = value if isinstance(value, list) else [value]
        if not types or any(t not in TYPES for t in types):
            raise UnsupportedSchema(at, keyword, f"must be of {', '.join(TYPES)}")
        out[keyword] = value

    def _values(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        for one in _filled_list(keyword, value, at) if keyword == "enum" else [value]:
            _check_value(keyword, one, at)
        out[keyword] = value

    def _count(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        if not _is_number(value) or value != int(value) or not 0 <= value < 2**31:
            raise UnsupportedSchema(at, keyword, "must be an integer from 0 to 2**31 - 1")
        # A key that is written twice counts twice in the grammar and once in the object; only names
        # that are required are sure to differ.
        required = schema.get("required", [])
        if keyword == "minProperties" and value > 1 + len(set(map(str, required))):
            raise UnsupportedSchema(
                at, keyword, "above one more than what is required is not supported"
            )
        if keyword == "maxLength" and schema.get("format") == "hostname":
            value = min(value, 253)
        out[keyword] = int(value)

    def _number(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        if not _is_number(value) or (keyword == "multipleOf" and value <= 0):
            raise UnsupportedSchema(
                at, keyword, "must be a number" + " above 0" * (keyword == "multipleOf")
            )
        if abs(value) > MAX_INTEGER:
            raise UnsupportedSchema(at, keyword, f"{value} is beyond 2**53")
        if keyword in ("minimum", "exclusiveMinimum") and keyword in out:
            value = max(value, out[keyword])
        if keyword in ("maximum", "exclusiveMaximum") and keyword in out:
            value = min(value, out[keyword])
        out[keyword] = value

    def _pattern(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        _check_pattern(keyword, value, at)
        _add_pattern(out, value)

    def _format(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        types = schema.get("type")
        numeric = set(types if isinstance(types, list) else [types]) <= {"integer", "number"}
        if isinstance(value, str) and numeric and value in _NUMBER_FORMATS:
            if bounds := _NUMBER_FORMATS[value]:
                out["minimum"] = max(bounds[0], out.get("minimum", bounds[0]))
                out["maximum"] = min(bounds[1], out.get("maximum", bounds[1]))
        elif isinstance(value, str) and value in _FORMATS:
            _add_pattern(out, _FORMATS[value])
        elif value == "hostname":
            out["format"] = value
            out["maxLength"] = min(253, out.get("maxLength", 253))
        elif isinstance(value, str) and value in _NATIVE_FORMATS:
            out["format"] = value
        else:
            raise UnsupportedSchema(at, keyword, f"{value!r} is not supported")

    def _required(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UnsupportedSchema(at, keyword, "must be a list of strings")
        if bad := next((v for v in value if _UNREPRESENTABLE.search(v)), None):
            raise UnsupportedSchema(at, keyword, f"has the name {bad!r} with a control character")
        out[keyword] = list(dict.fromkeys(value))

    def _unique(self, out: Any, schema: Any, keyword: str, value: Any, at: str, n: int) -> None:
        if value is not False:
            raise UnsupportedSchema(at, keyword)

    # What must hold of the whole

    def _relax(self, out: dict[str, Any]) -> None:
        """Say anyOf for oneOf where no value can satisfy two of its branches."""
        options = out["oneOf"]
        pairs = itertools.combinations(options, 2)
        if len(options) <= MAX_COMPARED and all(self._disjoint(a, b, 0) for a, b in pairs):
            del out["oneOf"]
            if "anyOf" in out:
                out["allOf"] = [*out.get("allOf", ()), {"anyOf": options}]
            else:
                out["anyOf"] = options

    def _disjoint(self, a: Any, b: Any, depth: int) -> bool:
        """Provably no value satisfies both, so that `oneOf` says the same as `anyOf`.

        False as well where that would take too long to find out.
        """
        a, b = self._target(a), self._target(b)
        if not isinstance(a, dict) or not isinstance(b, dict) or depth > 8:
            return False
        pair = id(a), id(b)
        if pair not in self._compared:
            self._compared[pair] = False  # for a pair that leads back to itself
            self._compared[pair] = self._compare(a, b, depth)
        return self._compared[pair]

    def _compare(self, a: dict[str, Any], b: dict[str, Any], depth: int) -> bool:
        values, others = literals(a), literals(b)
        self._budget -= 1 + len(values or ()) * len(others or ())
        if self._budget < 0:
            return False
        types = types_of(a) & types_of(b)
        if not types:
            return True
        if values is not None and others is not None:
            return not any(equal(v, w) for v in values for w in others)
        if types != {"object"}:
            return False
        shared = set(a.get("required", ())) & set(b.get("required", ()))
        props, other_props = a.get("properties", {}), b.get("properties", {})
        return any(
            self._disjoint(props.get(name), other_props.get(name), depth + 1) for name in shared
        )

    def _target(self, schema: Any) -> Any:
        for _ in range(8):
            if not isinstance(schema, dict) or set(schema) != {"$ref"}:
                break
            schema = self.defs.get(schema["$ref"].removeprefix("#/$defs/"))
        return schema

    def _check_finite(self) -> None:
        """A reference whose value would have to contain itself for ever traps the output."""
        ends: set[str] = set()
        while new := {n for n in self.defs if n not in ends and finite(self.defs[n], ends)}:
            ends |= new
        for pointer, name in self._names.items():
            if name not in ends:
                raise UnsupportedSchema(pointer, "$ref", "to this place has no finite value")


_Handler = Callable[[_Reader, Any, Any, str, Any, str, int], None]
_HANDLERS: Mapping[str, _Handler] = {
    "$ref": _Reader._ref,
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), _Reader._subschemas),
    "additionalProperties": _Reader._subschema,
    **dict.fromkeys(("properties", "patternProperties"), _Reader._named),
    "prefixItems": _Reader._subschemas,
    "items": _Reader._items,
    "additionalItems": _Reader._additional_items,
    "type": _Reader._type,
    **dict.fromkeys(("const", "enum"), _Reader._values),
    **dict.fromkeys(
        ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
        _Reader._count,
    ),
    **dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        _Reader._number,
    ),
    "pattern": _Reader._pattern,
    "format": _Reader._format,
    "required": _Reader._required,
    "uniqueItems": _Reader._unique,
}


def _filled_list(keyword: str, value: Any, at: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise UnsupportedSchema(at, keyword, "must be a list with at least one entry")
    return value


def _check_pattern(keyword: str, value: Any, at: str) -> None:
    if not isinstance(value, str):
        raise UnsupportedSchema(at, keyword, "must be a string")
    if _SET_OPERATION.search(value.replace("\\[", "")):
        raise UnsupportedSchema(at, keyword, "has '[', '&&', '--' or '~~' inside a character class")


def _add_pattern(out: dict[str, Any], pattern: str) -> None:
    if "pattern" in out:
        out.setdefault("allOf", []).append({"pattern": pattern})
    else:
        out["pattern"] = pattern


def _check_value(keyword: str, value: Any, at: str) -> None:
    if isinstance(value, dict):
        for key, one in value.items():
            _check_value(keyword, key, at)
            _check_value(keyword, one, at)
    elif isinstance(value, list):
        for one in value:
            _check_value(keyword, one, at)
    elif isinstance(value, str) and _UNREPRESENTABLE.search(value):
        raise UnsupportedSchema(at, keyword, f"{value!r} has a control character")
    elif _is_number(value) and abs(value) > MAX_INTEGER:
        raise UnsupportedSchema(at, keyword, f"{value} is beyond 2**53")
