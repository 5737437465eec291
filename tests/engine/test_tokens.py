"""Text to tokens and back, on SmolLM2's real tokenizer and on small ones of the other kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from difyops.engine.load import tokenizer_config
from difyops.engine.tokens import Tokenizer
from difyops.engine.toolcalls import ChatParser
from difyops.errors import PrerequisiteError, UsageError
from tests.engine import random_model

VOCABULARY = 49152  # SmolLM2's


def streamed(tokenizer: Tokenizer, ids: list[int], *stop: str) -> tuple[list[str], bool]:
    stream = tokenizer.stream(stop)
    parts = [stream.push(id) for id in ids]
    return [*parts, stream.flush()], stream.stopped


def pieces(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a lone byte or a piece of a character, where streaming goes wrong first."""
    return [id for id in range(2000) if not is_text(tokenizer.token_bytes(id))]


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_is_streamed_adds_up_to_the_whole(data: st.DataObject, smol_tokenizer: Any) -> None:
    broken = pieces(smol_tokenizer)
    assert len(broken) > 100
    one = st.one_of(st.integers(0, VOCABULARY - 1), st.sampled_from(broken), st.integers(0, 20))
    ids = data.draw(st.lists(one, max_size=40))
    parts, stopped = streamed(smol_tokenizer, ids)
    assert not stopped
    assert "".join(parts) == smol_tokenizer.decode(ids)
    assert smol_tokenizer.decode(ids) == smol_tokenizer.backend.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abA😀é \n", max_size=30), stop=st.lists(
    st.text(alphabet="abA😀é \n", min_size=1, max_size=5), min_size=1, max_size=3))  # fmt: skip
def test_stop_strings_end_the_text_wherever_tokens_end(
    text: str, stop: list[str], smol_tokenizer: Any
) -> None:
    parts, stopped = streamed(smol_tokenizer, smol_tokenizer.encode(text), *stop)
    ends = {word: text.find(word) + len(word) for word in stop if word in text}
    assert stopped == bool(ends)
    first = min(ends.values(), default=len(text))
    met = max((len(word) for word, end in ends.items() if end == first), default=0)
    assert "".join(parts) == text[: first - met]


def test_nothing_uncertain_is_shown(smol_tokenizer: Tokenizer) -> None:
    ids = smol_tokenizer.encode("smile 😀, STO")
    stream = smol_tokenizer.stream(["STOP"])
    shown = "".join(map(stream.push, ids))
    assert shown == "smile 😀, "
    assert stream.flush() == "STO"
    # The four bytes of an emoji are several tokens; none shows half of it.
    parts, _ = streamed(smol_tokenizer, smol_tokenizer.encode("😀"))
    assert len(parts) > 2
    assert [part for part in parts if part] == ["😀"]


def test_a_stop_string_over_three_tokens(smol_tokenizer: Tokenizer) -> None:
    ids = [i for part in ("one", " tw", "o thr", "ee four") for i in smol_tokenizer.encode(part)]
    parts, stopped = streamed(smol_tokenizer, ids, "two three", "never")
    assert stopped
    assert "".join(parts) == "one "
    stream = smol_tokenizer.stream(["one"])
    assert [stream.push(id) for id in ids[:2]] == ["", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_long_stop_string_costs_no_more_per_token(smol_tokenizer: Tokenizer) -> None:
    """Text that nearly matches, again and again: 20,000 tokens in a blink."""
    (token,) = smol_tokenizer.encode("a")
    parts, stopped = streamed(smol_tokenizer, [token] * 20_000, "a" * 5000 + "b")
    assert not stopped
    assert "".join(parts) == "a" * 20_000


def test_an_empty_stop_string_is_refused(smol_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="stop"):
        smol_tokenizer.stream(["x", ""])


def test_the_bytes_of_tokens_are_exact(smol_tokenizer: Tokenizer) -> None:
    text = "naïve 😀\n\tx"
    ids = smol_tokenizer.encode(text)
    assert b"".join(map(smol_tokenizer.token_bytes, ids)) == text.encode()
    assert any(not is_text(smol_tokenizer.token_bytes(id)) for id in ids)
    assert smol_tokenizer.token_bytes(2) == b"<|im_end|>"
    assert smol_tokenizer.token_bytes(10**6) == b""
    assert smol_tokenizer.decode([2, 10**6]) == ""


def test_special_tokens_in_a_text(smol_tokenizer: Tokenizer) -> None:
    ids = smol_tokenizer.encode("<|im_start|>user")
    assert ids[0] == 1
    assert smol_tokenizer.decode(ids) == "user"


def test_the_tags_that_the_parser_reads_are_text() -> None:
    """Also where a vocabulary has them as special tokens: a call would be content otherwise."""
    words = special_tags()
    tokenizer = Tokenizer(words, {"eos_token": "<|im_end|>"})
    assert {words.token_to_id("<tool_call>"), words.token_to_id("<think>")} <= {
        id for id, token in words.get_added_tokens_decoder().items() if token.special
    }
    said = (
        '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    )
    parser = ChatParser("hermes", reasoning=True)
    stream = tokenizer.stream()
    deltas = [
        delta
        for id in tokenizer.encode(said + "<|im_end|>")
        for delta in parser.push(stream.push(id))
    ]
    deltas += parser.push(stream.flush()) + parser.flush()
    assert "".join(delta.reasoning for delta in deltas) == "hm"
    assert not any(delta.content for delta in deltas)
    calls = [delta.call for delta in deltas if delta.call is not None]
    assert calls[0].name == "f" and parser.complete(1)
    assert json.loads("".join(call.arguments for call in calls)) == {"a": 1}


def special_tags() -> Backend:
    words = random_model.tokenizer(special_tags=True)
    words.add_special_tokens([AddedToken(tag, special=True) for tag in ("<think>", "</think>")])
    return words


def test_what_smollm2_says_of_itself(smol_tokenizer: Tokenizer) -> None:
    assert smol_tokenizer.vocabulary == VOCABULARY
    assert smol_tokenizer.stop_ids == {2}
    assert smol_tokenizer.eos == "<|im_end|>"
    assert "<|im_start|>" in (smol_tokenizer.chat_template or "")


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, unknown characters as bytes, a first space stripped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["\u2581", "h", "i", "\u2581h", "\u2581hi"]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    merges = [("\u2581", "h"), ("\u2581h", "i")]
    backend = Backend(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    return Tokenizer(backend, {"eos_token": "</s>", "bos_token": {"content": "<s>"}})


@given(text=st.text(alphabet="hi é\n😀", max_size=12))
def test_sentencepiece(text: str, sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == sentencepiece.backend.decode(ids) == text
    assert "".join(streamed(sentencepiece, ids)[0]) == text
    assert sentencepiece.token_bytes(3 + 0xE9) == b"\xe9"
    assert sentencepiece.stop_ids == {2}


def test_limits_saved_with_a_tokenizer_do_not_cut_prompts(
    smol_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    limited = Backend.from_str(smol_tokenizer.backend.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=16)
    limited.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json", {})
    text = "one two three four five six"
    assert tokenizer.encode(text) == smol_tokenizer.encode(text)
    assert len(tokenizer.encode(text)) > 4


def test_the_files_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<old>", "eos_token": "<e>"})
    write(tmp_path, "tokenizer_config.json", {"bos_token": "<new>", "chat_template": "first"})
    write(tmp_path, "generation_config.json", {"eos_token_id": [7, 8]})
    config = tokenizer_config(tmp_path, {"eos_token_id": 5})
    assert config["eos_token_id"] == [5, 7, 8]
    assert (config["bos_token"], config["eos_token"]) == ("<new>", "<e>")
    assert config["chat_template"] == "first"
    (tmp_path / "chat_template.jinja").write_text("second")
    assert tokenizer_config(tmp_path, {})["chat_template"] == "second"
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(PrerequisiteError, match=r"chat_template\.jinja: .*utf-8"):
        tokenizer_config(tmp_path, {})


@pytest.mark.parametrize("wrong", [[["x"]], "x", [True], {"a": 1}, [None], 1.0])
def test_a_wrong_end_names_its_file_and_key(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="eos_token_id"):
        small(eos_token_id=wrong)
    with pytest.raises(PrerequisiteError, match=r"/config\.json: eos_token_id"):
        tokenizer_config(tmp_path, {"eos_token_id": wrong})
    write(tmp_path, "generation_config.json", {"eos_token_id": wrong})
    with pytest.raises(PrerequisiteError, match=r"generation_config\.json: eos_token_id"):
        tokenizer_config(tmp_path, {})


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def small(**config: Any) -> Tokenizer:
    backend = Backend(models.BPE({"a": 0}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, config)


def test_named_templates() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert small(chat_template=named).chat_template == "d"
    assert small().chat_template is None
    with pytest.raises(PrerequisiteError, match="tool_use"):
        small(chat_template=named[:1])
    with pytest.raises(PrerequisiteError, match="chat_template"):
        small(chat_template=7)


def test_wrong_files_say_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(PrerequisiteError, match="no such file"):
        Tokenizer.from_file(path, {})
    path.write_text("{}")
    with pytest.raises(PrerequisiteError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_file(path, {})
    backend = Backend(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    backend.save(str(path))
    with pytest.raises(PrerequisiteError, match="the tokenizer's decoder WordPiece"):
        Tokenizer.from_file(path, {})
