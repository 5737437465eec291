"""Text to tokens and back: exact bytes, text that streams, stop strings. Knows no torch."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from difyops.engine import toolformats as tags
from difyops.engine.search import Pattern
from difyops.errors import PrerequisiteError, UsageError

#: The parser of the answer reads them, also where they are special tokens (toolcalls.py).
_READ = frozenset({tags.CALL_OPEN, tags.CALL_CLOSE, tags.THINK_OPEN, tags.THINK_CLOSE})
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Tokenizer:
    """A checkpoint's tokenizer, with what its files say about special tokens and the chat template.

    `config` holds the keys of tokenizer_config.json, generation_config.json and config.json that
    matter: `eos_token_id` (an int or a list), `*_token` (strings, or objects with `content`) and
    `chat_template`. Reading is safe from several threads at once.
    """

    def __init__(self, backend: Backend, config: Mapping[str, Any]) -> None:
        # A length limit or padding saved with the tokenizer would cut prompts in silence.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special: Mapping[str, str] = _special_strings(config)
        self.chat_template = _chat_template(config.get("chat_template"))
        self.stop_ids = self._stop_ids(config)
        #: One more than the greatest id.
        self.vocabulary = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._hidden = {
            id
            for id, token in backend.get_added_tokens_decoder().items()
            if token.special and token.content not in _READ
        }
        self._decoder = _Decoder(backend)

    @classmethod
    def from_file(cls, path: Path, config: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a tokenizer.json. Raises PrerequisiteError naming what is wrong."""
        if not path.is_file():
            raise PrerequisiteError(
                f"{path}: no such file",
                "the engine reads tokenizer.json only; transformers' save_pretrained writes one",
            )
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise PrerequisiteError(f"{path}: not a tokenizer: {error}") from error
        try:
            return cls(backend, config)
        except PrerequisiteError as error:
            raise PrerequisiteError(f"{path.parent}: {error.message}", error.hint) from error

    @property
    def eos(self) -> str | None:
        """The text of the token that ends a sequence, for the chat template."""
        return self.special.get("eos_token")

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The tokens of `text`.

        The text of a special token ("<|im_end|>") becomes that token: right for a rendered chat
        template, and for /v1/completions, whose prompt is the client's own raw sequence (llama.cpp
        and vLLM read it so, too). `bos` adds the tokens that the tokenizer puts around a sequence:
        right for /v1/completions; a chat template writes its own.
        """
        return list(self.backend.encode(text, add_special_tokens=bos).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` as `shown_bytes` has it; bytes that are no UTF-8 become U+FFFD."""
        text = b"".join(map(self.shown_bytes, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._decoder.strips_first_space else text

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes of one token, a special one's too; none for an id without a token."""
        token = self.backend.id_to_token(id)
        return b"" if token is None else self._decoder.token(token)

    def shown_bytes(self, id: int) -> bytes:
        """`token_bytes`, but none for a special token other than the tags of reasoning and calls:
        what the token adds to a text."""
        return b"" if id in self._hidden else self.token_bytes(id)

    def stream(self, stop: Sequence[str] = ()) -> TextStream:
        """A new incremental decoder; its text ends before the first stop string.

        Raises UsageError for an empty stop string.
        """
        return TextStream(self, stop, skip_space=self._decoder.strips_first_space)

    def _stop_ids(self, config: Mapping[str, Any]) -> frozenset[int]:
        ids = set(end_ids(config.get("eos_token_id")))
        if self.eos is not None and (id := self.backend.token_to_id(self.eos)) is not None:
            ids.add(id)
        return frozenset(ids)


class _Decoder:
    """Token text -> bytes, for the two ways of writing bytes in a vocabulary.

    Byte-level BPE writes each byte as one printable character (GPT-2); SentencePiece writes a space
    as U+2581 and bytes outside its vocabulary as `<0x0A>`.
    """

    def __init__(self, backend: Backend) -> None:
        decoder = backend.decoder
        parts = [] if decoder is None else _parts(json.loads(decoder.__getstate__()))
        kinds = {part["type"] for part in parts}
        self._levels = _byte_levels() if kinds == {"ByteLevel"} else None
        sentencepiece = kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
        if self._levels is None and not (kinds and sentencepiece):
            named = "+".join(sorted(kinds)) or "(none)"
            raise PrerequisiteError(
                f"the tokenizer's decoder {named} is not one that the engine knows",
                "byte-level BPE and SentencePiece-style tokenizers are supported",
            )
        self.strips_first_space = any(
            part["type"] == "Strip" or part.get("prepend_scheme") in ("always", "first")
            for part in parts
        )

    def token(self, token: str) -> bytes:
        if self._levels is None:
            if byte := _BYTE.match(token):
                return bytes([int(byte[1], 16)])
            return token.replace("\u2581", " ").encode()
        try:
            return bytes([self._levels[char] for char in token])
        except KeyError:  # an added token is written as it is
            return token.encode()


class TextStream:
    """Tokens -> text, each token's share at once; see request.TextStream.

    What is pushed and flushed adds up to `Tokenizer.decode` of all tokens, or to what of it comes
    before the first stop string: the one that is complete first, the longest if several are.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], skip_space: bool) -> None:
        if not all(stop):
            raise UsageError("stop: an empty string would stop before the first token")
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [Pattern(text) for text in stop]
        self._matched = [0] * len(stop)
        self._skip_space = skip_space
        self._held = ""  # the longest end of the text so far that begins a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        return self._text(self._tokenizer.shown_bytes(token), final=False)

    def flush(self) -> str:
        text = self._text(b"", final=True) + self._held
        self._held = ""
        return text

    def _text(self, data: bytes, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._utf8.decode(data, final)
        if text and self._skip_space:
            text, self._skip_space = text.removeprefix(" "), False
        if not self._stops:
            return text
        seen = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            pairs = zip(self._stops, self._matched, strict=True)
            self._matched = [stop.advance(matched, char) for stop, matched in pairs]
            pairs = zip(self._stops, self._matched, strict=True)
            if met := [matched for stop, matched in pairs if matched == len(stop)]:
                self.stopped, self._held = True, ""
                return seen[: end - max(met)]
        certain = len(seen) - max(self._matched)
        self._held = seen[certain:]
        return seen[:certain]


def end_ids(raw: object) -> list[int]:
    """What an `eos_token_id` names. Raises PrerequisiteError."""
    given: list[Any] = raw if isinstance(raw, list) else [] if raw is None else [raw]
    if not all(isinstance(id, int) and not isinstance(id, bool) for id in given):
        raise PrerequisiteError(f"eos_token_id: {raw!r} is neither a number nor a list of them")
    return given


def _parts(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [part for inner in decoder["decoders"] for part in _parts(inner)]
    return [decoder]


def _special_strings(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            found[key] = text
    return found


def _chat_template(raw: object) -> str | None:
    """One template, or the one called "default" of a list of `{name, template}`."""
    if raw is None or isinstance(raw, str):
        return raw
    try:
        named = {entry["name"]: str(entry["template"]) for entry in raw}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        raise PrerequisiteError(
            "chat_template: neither a text nor a list of named templates"
        ) from None
    if "default" not in named:
        raise PrerequisiteError(f"chat_template: none of {', '.join(named)} is called default")
    return named["default"]


def _byte_levels() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, others from U+0100 on."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + number): byte for number, byte in enumerate(others)
    }
