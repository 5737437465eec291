"""Which tokens may come next: a JSON schema, a regex, a choice or a tool call as token masks.

llguidance parses; here its answers become `Constraint`s (request.py), grammars are compiled once,
and what it would not enforce is refused (schema.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np

from difyops.engine import lark
from difyops.engine.freetext import FreeText, Place
from difyops.engine.schema import UnsupportedSchema, normalise, reachable
from difyops.engine.toolformats import CALL_OPEN, Tool, ToolFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

#: About a second of one core at the worst; past it the grammar is refused.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=2_000_000,
    max_items_in_row=20_000,  # four for each name that an object may begin with
    max_grammar_size=100_000,
    verbose_errors=False,
)
_ROW = re.compile(r"row has (\d+) items; max is (\d+)")
_LOCATE_S = 0.5
MAX_CHOICES = 1024
MAX_TEXT = 64 * 1024


class GrammarFailed(RuntimeError):
    """The grammar met a limit of its parser, or a dead end, in the middle of an output."""


class Grammars:
    """Compiles grammars for one tokenizer; any thread may ask.

    `vocab_size` is the model's V: ids that the tokenizer lacks are never allowed. `stop_ids` are
    what may follow a complete output. The `cache` grammars used last stay compiled.

    In every method, `after` is the text that ends the reasoning: until the output has it, all is
    allowed; up to two new lines may stand between it and what is constrained.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Collection[int], *, cache: int = 64
    ) -> None:
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, frozenset(stop_ids))
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._cache = cache
        self._lock = threading.Lock()

    def json_schema(self, schema: Any, *, after: str | None = None) -> GrammarConstraint:
        """One instance of `schema`.

        Raises UnsupportedSchema for what would not be enforced or cannot be satisfied.
        """
        source = lark.from_schema(*normalise(schema))  # raises UnsupportedSchema, a ValueError
        try:
            return self._constraint(source, after)
        except ValueError as error:
            raise self._locate(schema, str(error)) from None

    def json_object(self, *, after: str | None = None) -> GrammarConstraint:
        return self.json_schema({"type": "object"}, after=after)

    def regex(self, pattern: str, *, after: str | None = None) -> GrammarConstraint:
        r"""The whole output matches `pattern`; \d and \w are ASCII. Raises ValueError."""
        _check_size("regex", pattern)
        return self._constraint(lark.from_regex(pattern), after)

    def choice(self, texts: Sequence[str], *, after: str | None = None) -> GrammarConstraint:
        """One of `texts`. Raises ValueError."""
        if not 1 <= len(texts) <= MAX_CHOICES or not all(texts):
            raise ValueError(f"choice: 1 to {MAX_CHOICES} texts are needed, and none empty")
        _check_size("choice", "".join(texts))
        return self._constraint(lark.from_choice(texts), after)

    def tools(
        self,
        tools: Sequence[Tool],
        form: ToolFormat,
        *,
        parallel: bool = False,
        after: str | None = None,
    ) -> GrammarConstraint:
        """A call of one of `tools`, written as `form` says; `parallel`: or several calls.

        Raises UnsupportedSchema with pointers that begin with the tool's place: `/0/parameters/…`.
        """
        source = lark.from_tools(tools, form, self._vocabulary.literal, parallel=parallel)
        with self._located(tools):
            return self._constraint(source, after)

    def optional_tools(
        self,
        tools: Sequence[Tool],
        form: ToolFormat,
        *,
        parallel: bool = False,
        begins: str | None = None,
        after: str | None = None,
    ) -> GrammarConstraint:
        """Free text, in which whatever opens a call is a call of one of `tools`.

        Without `parallel`, the output ends with its first call. `begins`: the output is in the
        reasoning that `after` ends only if it begins with this text.

        Raises UnsupportedSchema, as `tools` does.
        """
        source = lark.from_opened_call(tools, form, self._vocabulary.literal, parallel=parallel)
        texts = [text for text in (begins, after, CALL_OPEN) if text is not None]
        free = self._vocabulary.free_text(tuple(texts), begins is not None)
        with self._located(tools):
            matcher = self._matcher(source.grammar())
        return GrammarConstraint(matcher, self._vocabulary, free, may_stop=True, repeated=parallel)

    @contextlib.contextmanager
    def _located(self, tools: Sequence[Tool]) -> Iterator[None]:
        """What fails for a tool's schema names the place in it."""
        try:
            yield
        except ValueError as error:
            for i, tool in enumerate(tools):
                if not tool.strict:
                    continue
                try:
                    self._constraint(lark.from_schema(*normalise(tool.parameters)), None)
                except ValueError as inner:
                    found = self._locate(tool.parameters, str(inner))
                    raise found.inside(f"/{i}/parameters") from None
            raise UnsupportedSchema("", "tools", f"make no grammar: {error}") from None

    def _constraint(self, source: lark.Source, after: str | None) -> GrammarConstraint:
        free = None if after is None else self._vocabulary.free_text((after,), False)
        matcher = self._matcher(source.grammar(gap=after is not None))
        return GrammarConstraint(matcher, self._vocabulary, free)

    def _matcher(self, grammar: str) -> Any:
        with self._lock:
            found = self._compiled.get(grammar)
        if found is None:  # two threads may both compile it; neither waits for the other
            found = llguidance.LLMatcher(
                self._vocabulary.tokenizer,
                llguidance.LLMatcher.grammar_from_lark(grammar),
                log_level=0,
                limits=_LIMITS,
            )
            if found.is_error():
                raise ValueError(_reason(found.get_error()))
            self._try_out(found.deep_copy())
        with self._lock:
            self._compiled[grammar] = found
            self._compiled.move_to_end(grammar)
            while len(self._compiled) > self._cache:
                self._compiled.popitem(last=False)
            return found.deep_copy()

    def _try_out(self, matcher: Any) -> None:
        """Raises ValueError for a grammar that meets a limit where it begins.

        That is where limits are met: all the names of an object, or all of an expression, at once.
        """
        allowed = np.unpackbits(_mask(matcher), bitorder="little")
        allowed[list(self._vocabulary.stop_ids)] = 0
        for first in ([int(allowed.argmax())], self._vocabulary.split(b'{"')):
            begun = matcher.deep_copy()
            taken = begun.try_consume_tokens(first)
            _check(begun)
            if taken == len(first):
                _mask(begun)

    def _locate(self, schema: Any, why: str) -> UnsupportedSchema:
        """The innermost place that fails by itself; llguidance's messages name none."""
        until = time.monotonic() + _LOCATE_S
        for pointer, part in reversed(reachable(schema)):
            if time.monotonic() > until:
                break
            if reason := self._refusal(part, schema, pointer):
                for keyword in reversed(part):
                    rest = {k: v for k, v in part.items() if k != keyword}
                    if not self._refusal(rest, schema, pointer):
                        return UnsupportedSchema(f"{pointer}/{keyword}", keyword, reason)
                return UnsupportedSchema(pointer, "schema", reason)
        return UnsupportedSchema("", "schema", why)

    def _refusal(self, part: Any, root: Any, pointer: str) -> str | None:
        try:
            self._matcher(lark.from_schema(*normalise(part, root=root, at=pointer)).grammar())
        except ValueError as error:
            return str(error)
        return None


def _reason(error: str) -> str:
    """llguidance's message without its excerpt of the grammar, which nobody has written."""
    if "oneOf constraints" in error:
        return "has branches that may overlap, and is not supported: anyOf is"
    text = error.partition("\n   1 | ")[0].rpartition("JSON schema: ")[2]
    return "cannot be used: " + " ".join(text.split())


def _mask(matcher: Any) -> NDArray[np.uint8]:
    mask = matcher.compute_bitmask()
    _check(matcher)
    return np.frombuffer(mask, dtype=np.uint8)


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise ValueError(f"cannot be used: {_limit(matcher.get_error())}")


def _limit(error: str) -> str:
    """llguidance's message about a limit in words that need no knowledge of its parser."""
    if row := _ROW.search(error):
        return f"it can go on in {row[1]} ways at one place, and {row[2]} are accepted"
    return "its patterns or lengths are too complex to follow"


def _check_size(name: str, text: str) -> None:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name}: {len(text)} characters; {MAX_TEXT} are accepted")


class GrammarConstraint:
    """A `Constraint` (request.py): free text up to a place, if there is any, then a grammar.

    `may_stop`: the free text may be all there is; otherwise the end waits for the grammar's.
    `repeated`: after what the grammar describes, the last of the free text's places may come again.
    Made by `Grammars`.
    """

    def __init__(
        self,
        matcher: Any,
        vocabulary: _Vocabulary,
        free: FreeText | None,
        *,
        may_stop: bool = False,
        repeated: bool = False,
    ) -> None:
        self._fresh = matcher
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._free = free
        self._may_stop = may_stop
        self._repeated = repeated
        self._place = None if free is None else free.start  # None: the grammar holds
        self._stopped = False
        # Per token: the state before it, and how many tokens the matcher was given for it.
        self._past: list[tuple[Place | None, bool, Any, int]] = []

    @property
    def finished(self) -> bool:
        return self._stopped or (self._place is None and bool(self._matcher.is_stopped()))

    def fresh(self) -> GrammarConstraint:
        """Another one of the same grammar, for as long as this one has not advanced."""
        if self._past:
            raise ValueError("a constraint that has advanced is not at its beginning")
        other = copy.copy(self)
        other._fresh = other._matcher = self._fresh.deep_copy()
        other._past = []
        return other

    def mask(self) -> NDArray[np.int32] | None:
        """See `Constraint`. Raises GrammarFailed."""
        if self._stopped:
            return self._vocabulary.stop_mask()
        if self._free is not None and self._place is not None:
            return self._free_mask(self._free.overshooting(self._place))
        mask = np.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=np.int32)
        if self._matcher.is_error():
            raise _failed(self._matcher)
        mask = self._vocabulary.fit(mask)
        if not mask.any():
            raise GrammarFailed("no token of the vocabulary keeps to the grammar")
        return mask

    def advance(self, token: int) -> None:
        """See `Constraint`."""
        before = (self._place, self._stopped, self._matcher)
        self._past.append((*before, self._take(token)))

    def rollback(self, tokens: int) -> None:
        """See `Constraint`. Raises ValueError if there were fewer."""
        if not 0 <= tokens <= len(self._past):
            raise ValueError(f"{tokens} tokens to take back, of {len(self._past)}")
        for _ in range(tokens):
            place, stopped, matcher, given = self._past.pop()
            self._matcher.rollback(given)
            self._place, self._stopped, self._matcher = place, stopped, matcher

    def _take(self, token: int) -> int:
        if self._stopped or not 0 <= token < self._vocabulary.known:
            raise self._refused(token)
        if token in self._vocabulary.stop_ids:
            # The matcher never sees them: a finished one takes no more, and free text is not its.
            if not (self._may_stop if self._place is not None else self._matcher.is_accepting()):
                raise self._refused(token)
            self._stopped = True
            return 0
        if self._free is None or self._place is None:
            return self._keep_to(self._matcher, [token], token)
        place, rest = self._free.step(self._place, self._vocabulary.bytes_of(token))
        if rest is None:
            self._place = place
            return 0
        matcher = self._fresh.deep_copy() if self._repeated else self._matcher
        return self._keep_to(matcher, self._vocabulary.split(rest), token)

    def _keep_to(self, matcher: Any, tokens: Sequence[int], token: int) -> int:
        given = self._give(matcher, tokens, token)
        self._matcher = matcher
        ended = self._repeated and matcher.is_accepting()
        self._place = self._free.again if self._free is not None and ended else None
        return given

    def _give(self, matcher: Any, tokens: Sequence[int], token: int) -> int:
        # consume_token would leave the matcher in an error that cannot be rolled back.
        if (taken := matcher.try_consume_tokens(tokens)) != len(tokens):
            if matcher.is_error():
                raise _failed(matcher)
            matcher.rollback(taken)
            raise self._refused(token)
        return len(tokens)

    def _refused(self, token: int) -> ValueError:
        return ValueError(f"token {token} is not allowed by the grammar here")

    def _free_mask(self, overshooting: Iterable[tuple[int, bytes]]) -> NDArray[np.int32] | None:
        """All but the tokens that end the free text and go on with what the grammar forbids, and
        the end itself where it has to wait."""
        bad = {t for t, rest in overshooting if not self._may_begin(rest)}
        if not self._may_stop:
            bad |= self._vocabulary.stop_ids
        return self._vocabulary.all_but(frozenset(bad)) if bad else None

    def _may_begin(self, rest: bytes) -> bool:
        tokens = self._vocabulary.split(rest)
        return bool(self._fresh.validate_tokens(tokens) == len(tokens))


def _failed(matcher: Any) -> GrammarFailed:
    return GrammarFailed(f"the grammar cannot be followed further: {_limit(matcher.get_error())}")


class _Vocabulary:
    """One tokenizer as llguidance and the masks need it."""

    def __init__(self, tokenizer: Tokenizer, size: int, stop_ids: frozenset[int]) -> None:
        self.known = min(size, tokenizer.get_vocab_size(with_added_tokens=True))
        if not stop_ids or not all(0 <= i < self.known for i in stop_ids):
            raise ValueError(f"stop_ids {sorted(stop_ids)}: ids below {self.known} are needed")
        self.size = size
        self.stop_ids = stop_ids
        self.tokenizer = llguidance.LLTokenizer(
            tokenizer.to_str(),
            n_vocab=max(size, tokenizer.get_vocab_size(with_added_tokens=True)),
            eos_token=sorted(stop_ids),
        )
        # llguidance takes added tokens of the form <…> for special ones, too: no text matches them.
        added = tokenizer.get_added_tokens_decoder()
        self._special = {
            t.content: i for i, t in added.items() if self.tokenizer.is_special_token(i)
        }
        self.free_text = functools.cache(self._free_text)
        self._others = functools.lru_cache(64)(self._all_but)

    def literal(self, text: str) -> str:
        """`text` as a Lark rule needs it: its token if it is a special one, otherwise its bytes."""
        token = self._special.get(text)
        return lark.quoted(text) if token is None else f"<[{token}]>"

    def bytes_of(self, token: int) -> bytes:
        return bytes(self.tokenizer.decode_bytes([token]))

    def split(self, data: bytes) -> list[int]:
        """Some tokens that are these bytes; the matcher does not mind which."""
        return list(self.tokenizer.tokenize_bytes(data)) if data else []

    def _free_text(self, texts: tuple[str, ...], optional: bool) -> FreeText:
        return FreeText(texts, self.bytes_of, self.known, optional=optional)

    def fit(self, mask: NDArray[np.int32]) -> NDArray[np.int32]:
        """int32 of shape [ceil(V / 32)], without the ids that the tokenizer or the model lacks."""
        return mask[: (self.size + 31) // 32] & self._exists

    @functools.cached_property
    def _exists(self) -> NDArray[np.int32]:
        return self._packed(range(self.known))

    def stop_mask(self) -> NDArray[np.int32]:
        return self._packed(self.stop_ids)

    def all_but(self, tokens: frozenset[int]) -> NDArray[np.int32]:
        return self._others(tokens).copy()  # torch wants arrays that may be written

    def _all_but(self, tokens: frozenset[int]) -> NDArray[np.int32]:
        return self._exists & ~self._packed(tokens)

    def _packed(self, tokens: Iterable[int]) -> NDArray[np.int32]:
        bits = np.zeros((self.size + 31) // 32 * 32, dtype=np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
