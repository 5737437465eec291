"""Documents -> a tokenizer and two files of tokens, one to train on and one held out."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from difyops.errors import UsageError
from difyops.files import write_atomic
from difyops.tune import corpus
from difyops.tune.corpus import Document, Section, Source

TEXT_END, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (TEXT_END, START, END)
#: One document in so many is held out; one in so many is told as a dialogue.
HELD_OUT, DIALOGUE = 100, 10
#: Characters of a document below which it is left out, and of an answer, at most.
LEAST, LONGEST_ANSWER = 200, 1200
_QUESTIONS = (
    "{}?", "What is {}?", "Tell me about {}.", "Explain {}.", "What should I know about {}?",
    "{}: how does it work?", "Please describe {}.",
)  # fmt: skip


@dataclass
class Row:
    """What one package gave, for the model card; `bytes` are those that were kept, in UTF-8."""

    package: str
    version: str
    licence: str
    documents: int
    bytes: int


def make(
    folder: Path, debs: Path, *, vocabulary: int, seed: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Write train.bin and heldout.bin (uint16, little-endian), tokenizer.json,
    tokenizer_config.json, generation_config.json and data.json into `folder`; the packages lie in
    `debs`, where they are downloaded to. Answers what data.json says.

    Raises UsageError for a vocabulary that does not fit into uint16, PrerequisiteError without apt.
    """
    if not 256 + len(SPECIAL) < vocabulary <= 1 << 16:
        raise UsageError(f"--vocabulary: {vocabulary} is not from 260 to 65536", "4096")
    found, rows = _gather(corpus.sources(), debs, tell)
    random.Random(seed).shuffle(found)  # noqa: S311
    heldout, train = found[: len(found) // HELD_OUT], found[len(found) // HELD_OUT :]
    tell(f"training a byte-level BPE of {vocabulary} tokens")
    words = tokenizer((text(document) for document in train), vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {"seed": seed, "vocabulary": words.get_vocab_size()}
    for name, part in (("train", train), ("heldout", heldout)):
        tell(f"writing {name}.bin")
        tokens = encode(words, part)
        tokens.tofile(folder / f"{name}.bin")
        size = sum(len(text(document).encode()) for document in part)
        facts[name] = {"documents": len(part), "tokens": len(tokens), "bytes": size}
    facts["packages"] = [asdict(row) for row in rows]
    write_tokenizer(words, folder)
    write_atomic(folder / "data.json", json.dumps(facts, indent=2) + "\n")
    return facts


def _gather(
    wanted: Sequence[Source], debs: Path, tell: Callable[[str], None]
) -> tuple[list[Document], list[Row]]:
    """The documents of all packages, each paragraph once, and the table of them."""
    files = corpus.download(wanted, debs)
    seen: set[bytes] = set()
    found, rows = [], []
    with ProcessPoolExecutor() as pool:
        read = pool.map(corpus.documents, wanted, [files[s.package] for s in wanted])
        for source, documents in zip(wanted, read, strict=True):
            kept = [d for d in unique(documents, seen) if len(text(d)) >= LEAST]
            size = sum(len(text(document).encode()) for document in kept)
            deb = corpus.version(files[source.package])
            rows.append(Row(source.package, deb, source.licence, len(kept), size))
            found += kept
            tell(f"{source.package} {deb}: {len(kept)} documents, {size / 1e6:.1f} MB")
    return found, rows


def unique(documents: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    """The documents without the paragraphs in `seen`, which grows, and without empty sections."""

    def new(paragraph: str) -> bool:
        key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
        if key in seen:
            return False
        seen.add(key)
        return True

    for document in documents:
        sections = [
            Section(s.heading, [p for p in s.paragraphs if new(p)]) for s in document.sections
        ]
        yield Document(document.name, [section for section in sections if section.paragraphs])


def text(document: Document) -> str:
    """Headings and paragraphs with an empty line between them; one document in ten, chosen by its
    name, as a dialogue. The special tokens of that are spelled out."""
    if hashlib.blake2b(document.name.encode(), digest_size=4).digest()[0] % DIALOGUE == 0:
        return dialogue(document)
    parts = [part for s in document.sections for part in (s.heading, *s.paragraphs) if part]
    return "\n\n".join(plain(part) for part in parts)


def dialogue(document: Document) -> str:
    """Each section's heading as a question, and what stands under it as the answer."""
    turns = []
    for section in document.sections:
        answer = ""
        for paragraph in map(plain, section.paragraphs):
            if answer and len(answer) + len(paragraph) > LONGEST_ANSWER:
                break
            answer += ("\n\n" if answer else "") + paragraph
        if section.heading and answer:
            heading = plain(section.heading)
            how = hashlib.blake2b(heading.encode(), digest_size=1).digest()[0] % len(_QUESTIONS)
            question = _QUESTIONS[how].format(heading.rstrip("?:.") or heading)
            turns += [f"{START}user\n{question}{END}\n{START}assistant\n{answer}{END}\n"]
    return "".join(turns)


def plain(text: str) -> str:
    """A document that speaks of special tokens does not thereby have any."""
    for token in SPECIAL:
        text = text.replace(token, token.replace("|", "¦"))
    return text


def tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE with ChatML's special tokens: any text in, any tokens out."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
    )
    made.train_from_iterator(texts, trainer)
    return made


def encode(
    words: Tokenizer, documents: Sequence[Document], batch: int = 512
) -> np.ndarray[Any, Any]:
    """All documents one after the other, each with the end of text behind it: [N], uint16."""
    end = [words.token_to_id(TEXT_END)]
    parts = []
    for first in range(0, len(documents), batch):
        texts = [text(document) for document in documents[first : first + batch]]
        for encoded in words.encode_batch_fast(texts):
            parts.append(np.array(encoded.ids + end, dtype="<u2"))
    return np.concatenate(parts)


def write_tokenizer(words: Tokenizer, folder: Path) -> None:
    """What a model directory has beside weights and config."""
    words.save(str(folder / "tokenizer.json"))
    ends = [words.token_to_id(END), words.token_to_id(TEXT_END)]
    template = resources.files("difyops.tune").joinpath("chat_template.jinja")
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": template.read_text(encoding="utf-8"),
            "bos_token": None,
            "eos_token": END,
            "pad_token": TEXT_END,
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
        },
        "generation_config.json": {"eos_token_id": ends, "pad_token_id": ends[1]},
    }
    for name, content in files.items():
        write_atomic(folder / name, json.dumps(content, indent=2) + "\n")
