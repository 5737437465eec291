"""Random weights write valid JSON for random schemas, the drafts' own and collected ones."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difyops.engine import schemafacts
from difyops.engine.schema import UnsupportedSchema
from tests.engine.constrained import GRAMMARS, validates, write
from tests.engine.test_schema import FORMATS


class Schemas:
    """Random schemas of what is enforced, satisfiable by construction."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def make(self, depth: int = 3) -> dict[str, Any]:
        kinds = ["string", "number", "integer", "boolean", "null", "enum", "const", "format"]
        if depth:
            kinds += ["object", "array", "anyOf", "oneOf", "allOf", "map", "ref"] * 2
        return getattr(self, f"_{self.rng.choice(kinds)}")(depth)  # type: ignore[no-any-return]

    def _string(self, depth: int) -> dict[str, Any]:
        low = self.rng.randint(0, 4)
        options = [{}, {"minLength": low, "maxLength": low + 6}, {"pattern": "^[a-z]+-?[0-9]{2}$"}]
        return {"type": "string", **self.rng.choice(options)}

    def _number(self, depth: int) -> dict[str, Any]:
        low = self.rng.uniform(-100, 100)
        options = [{}, {"minimum": low}, {"minimum": low, "exclusiveMaximum": low + 30}]
        return {"type": "number", **self.rng.choice(options)}

    def _integer(self, depth: int) -> dict[str, Any]:
        low = self.rng.randint(-1000, 1000)
        options = [
            {},
            {"exclusiveMinimum": low},
            {"minimum": low, "maximum": low + 50, "multipleOf": 3},
        ]
        return {"type": "integer", **self.rng.choice(options)}

    def _boolean(self, depth: int) -> dict[str, Any]:
        return {"type": "boolean"}

    def _null(self, depth: int) -> dict[str, Any]:
        return {"type": "null"}

    def _enum(self, depth: int) -> dict[str, Any]:
        values = ["é\n", 'a"b', 1, -2.5, None, True, [1, {"a": "b"}], {}]
        return {"enum": self.rng.sample(values, self.rng.randint(1, 5))}

    def _const(self, depth: int) -> dict[str, Any]:
        return {"const": self.rng.choice(["x", 3, None, {"k": [False]}])}

    def _format(self, depth: int) -> dict[str, Any]:
        return {"type": "string", "format": self.rng.choice(sorted(FORMATS))}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self.rng.sample(["a", "b c", "ключ", "$ref", "type", 'q"', "x/y~z"], 4)
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self.make(depth - 1) for name in names},
            "required": self.rng.sample(names, self.rng.randint(0, 4)),
        }
        if self.rng.random() < 0.7:
            schema["additionalProperties"] = self.rng.choice([False, self.make(0)])
        return schema

    def _map(self, depth: int) -> dict[str, Any]:
        schema = {"type": "object", "additionalProperties": self.make(depth - 1)}
        if self.rng.random() < 0.5:
            schema |= {"patternProperties": {"^p": self.make(0)}, "maxProperties": 3}
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        low = self.rng.randint(0, 2)
        schema: dict[str, Any] = {"type": "array", "items": self.make(depth - 1), "minItems": low}
        if self.rng.random() < 0.5:
            schema["maxItems"] = low + self.rng.randint(0, 3)
        if self.rng.random() < 0.3:
            schema["prefixItems"] = [self.make(0), self.make(depth - 1)]
        return schema

    def _anyOf(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.make(depth - 1) for _ in range(self.rng.randint(1, 3))]}

    def _oneOf(self, depth: int) -> dict[str, Any]:
        branches = [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}, "value": self.make(depth - 1)},
                "required": ["kind"],
            }
            for kind in ("a", "b")
        ]
        return {"oneOf": [*branches, {"type": "null"}]}

    def _allOf(self, depth: int) -> dict[str, Any]:
        parts = [{"properties": {name: self.make(depth - 1)}} for name in ("a", "b")]
        return {"type": "object", "allOf": [*parts, {"required": ["b"]}]}

    def _ref(self, depth: int) -> dict[str, Any]:
        name = f"n{self.rng.randint(0, 10**9)}"
        tree = {
            "type": "object",
            "properties": {
                "v": self.make(0),
                "next": {"type": "array", "items": {"$ref": f"#/$defs/{name}"}},
            },
            "required": ["v"],
        }
        return {"$ref": f"#/$defs/{name}", "$defs": {name: tree}}


def lift(schema: Any, defs: dict[str, Any]) -> Any:
    """The nested $defs at the root, where their pointers look for them."""
    if isinstance(schema, list):
        return [lift(one, defs) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = schema.get("$defs")
    if isinstance(inner, dict) and "$ref" in schema:
        defs.update({name: lift(one, defs) for name, one in inner.items()})
        schema = {k: v for k, v in schema.items() if k != "$defs"}
    return {k: lift(v, defs) for k, v in schema.items()}


def test_random_weights_write_valid_json_for_500_schemas() -> None:
    bad = []
    for seed in range(500):
        defs: dict[str, Any] = {}
        schema = lift(Schemas(seed).make(), defs) | ({"$defs": defs} if defs else {})
        text = write(GRAMMARS.json_schema(schema), seed)
        if not validates(text, schema):
            bad.append((seed, schema, text))
    assert not bad, (len(bad), bad[:3])


def leaves() -> st.SearchStrategy[Any]:
    """Schemas of single values, each satisfiable."""
    low, span = st.integers(-(2**40), 2**40), st.integers(1, 2**30)
    texts = st.text(max_size=4)  # with quotes, escapes and control characters
    sizes = st.tuples(st.integers(0, 5), st.integers(0, 9))
    scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(-1e9, 1e9), texts)
    return st.one_of(
        st.just(True),
        st.sampled_from(schemafacts.TYPES).map(lambda t: {"type": t}),
        st.lists(st.sampled_from(schemafacts.TYPES), min_size=1, unique=True).map(
            lambda types: {"type": types}
        ),
        sizes.map(lambda n: {"type": "string", "minLength": n[0], "maxLength": sum(n)}),
        st.tuples(low, span).map(lambda n: {"type": "integer", "minimum": n[0], "maximum": sum(n)}),
        st.tuples(low, span).map(
            lambda n: {"type": "number", "exclusiveMinimum": n[0], "exclusiveMaximum": sum(n)}
        ),
        st.sampled_from(sorted(FORMATS)).map(lambda f: {"type": "string", "format": f}),
        scalars.map(lambda value: {"const": value}),
        st.lists(scalars, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    )


def compounds(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text('ab "\\é/~$\u2028', max_size=3)
    objects = st.dictionaries(names, inner, max_size=4).flatmap(
        lambda properties: st.fixed_dictionaries(
            {"type": st.just("object"), "properties": st.just(properties)},
            optional={
                "required": st.lists(st.sampled_from(sorted(properties)), unique=True)
                if properties
                else st.just([]),
                "additionalProperties": st.one_of(st.booleans(), inner),
            },
        )
    )
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=3),
            "minItems": st.integers(0, 2),
            "maxItems": st.integers(2, 4),
        },
    )
    options = st.lists(inner, min_size=1, max_size=3)
    either = st.sampled_from(["anyOf", "oneOf"])
    both = st.tuples(inner, inner).map(lambda two: {"allOf": list(two)})
    return st.one_of(
        objects, arrays, st.builds(lambda keyword, of: {keyword: of}, either, options), both
    )


def test_what_hypothesis_thinks_of_is_enforced_or_refused() -> None:
    accepted = []

    @settings(max_examples=120, deadline=None, derandomize=True)
    @given(schema=st.recursive(leaves(), compounds, max_leaves=8), seed=st.integers(0, 99))
    def check(schema: Any, seed: int) -> None:
        with contextlib.suppress(UnsupportedSchema):
            constraint = GRAMMARS.json_schema(schema)
            accepted.append(schema)
            assert validates(write(constraint, seed), schema)

    check()
    assert len(accepted) >= 60, len(accepted)


def test_the_drafts_own_schemas_are_enforced_or_refused() -> None:
    """The schemas of schemas, and each of their definitions."""
    registry = jsonschema.validators.SPECIFICATIONS
    documents = [(uri, registry.contents(uri)) for uri in sorted(registry)]
    assert len(documents) >= 15
    valid, refused, wrong = counted(parts(documents))
    assert not wrong
    assert (valid, refused) >= (17, 30), (valid, refused)


Named = Iterable[tuple[str, Any]]


def parts(documents: Named) -> Iterator[tuple[str, Any]]:
    """Schemas as a whole, and each of their definitions."""
    for title, document in documents:
        yield title, document
        for keyword in ("definitions", "$defs"):
            for name in document.get(keyword) or ():
                pointer = name.replace("~", "~0").replace("/", "~1").replace("%", "%25")
                # A reference to it alone: what stands beside one would have to hold as well.
                about = {k: document[k] for k in ("$schema", keyword) if k in document}
                yield f"{title} {name}", about | {"$ref": f"#/{keyword}/{pointer}"}


def counted(schemas: Named) -> tuple[int, int, list[tuple[str, str | None]]]:
    """How many random weights write a valid text for, how many are refused, and the rest."""
    valid, refused, wrong = 0, 0, []
    for name, schema in schemas:
        try:
            text = write(GRAMMARS.json_schema(schema))
        except UnsupportedSchema:
            refused += 1
            continue
        if validates(text, schema):
            valid += 1
        else:
            wrong.append((name, text))
    return valid, refused, wrong


def collected() -> Iterator[tuple[str, Any]]:
    """A folder of JSON files."""
    for path in sorted(Path(os.environ["DIFYOPS_JSON_SCHEMAS"]).rglob("*.json")):
        try:
            document = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(document, dict) and len(json.dumps(document)) <= 100_000:
            yield path.name, document


@pytest.mark.skipif("DIFYOPS_JSON_SCHEMAS" not in os.environ, reason="no DIFYOPS_JSON_SCHEMAS")
@pytest.mark.timeout(3600)
def test_random_weights_write_valid_json_for_collected_schemas() -> None:
    """A random walk may never meet a text that a pattern asks for: it is counted apart."""
    valid, refused, wrong = counted(parts(collected()))
    unfinished = [name for name, text in wrong if text is None]
    print(f"{valid} valid, {refused} refused, {len(unfinished)} unfinished: {unfinished}")
    assert len(wrong) == len(unfinished) < valid / 50 and valid >= 500, wrong
