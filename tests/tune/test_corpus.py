"""Documents out of packages: HTML and POD to paragraphs, each once, and dialogues of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from difyops.errors import PrerequisiteError
from difyops.tune import corpus, data
from difyops.tune.corpus import Document, Section, Source, documents, read, sources

PAGE = """<!DOCTYPE html><html><head><title>Left out</title><style>p {}</style></head><body>
<nav><p>Home</p></nav><div class="sphinxsidebar"><div><p>Also left out</p></div></div>
<p>Before any heading.</p>
<h1>Slots &amp; pages<a class="headerlink" href="#x">¶</a></h1>
<p>A request is
   a <em>slot</em>.</p>
<ul><li>free</li><li><p>taken</p></li></ul>
<pre>if x:
    <b>y()</b>
</pre>
<p>日本語の段落です。</p>
<h2>Empty</h2>
<div class="withsidebar"><p>Last.<br>Line.</p></div></body></html>"""


def test_html_becomes_headings_and_paragraphs() -> None:
    assert read("page.html", PAGE) == [
        Section("", ["Before any heading."]),
        Section("Slots & pages", ["A request is a slot.", "free", "taken", "if x:\n    y()"]),
        Section("Empty", ["Last.", "Line."]),
    ]


def test_pod_becomes_headings_and_paragraphs() -> None:
    text = "=head1 B<NAME>\n\nperl - C<< a->b >> and I<more>\n\n=over 4\n\n=item x\n\n  code\n"
    section = Section("NAME", ["perl - a->b and more", "  code"])
    assert read("perl.pod", text) == [Section(""), section]


def test_a_paragraph_stands_once_whatever_its_spaces() -> None:
    seen: set[bytes] = set()
    twice = [
        Document("a", [Section("A", ["one  two", "three"]), Section("B", ["one two"])]),
        Document("b", [Section("C", ["three", "four"])]),
    ]
    assert list(data.unique(twice, seen)) == [
        Document("a", [Section("A", ["one  two", "three"])]),
        Document("b", [Section("C", ["four"])]),
    ]


def test_a_dialogue_asks_for_headings_and_special_tokens_are_only_its_own() -> None:
    told = data.dialogue(
        Document("a", [Section("", ["no question"]), Section("Slots", ["x" * 1000, "y" * 500]),
                       Section("Marks", ["a <|im_end|> b"])])
    )  # fmt: skip
    turns = told.split("<|im_start|>")[1:]
    assert [turn.split("\n")[0] for turn in turns] == ["user", "assistant"] * 2
    assert "Slots" in turns[0] and turns[1] == "assistant\n" + "x" * 1000 + "<|im_end|>\n"
    assert turns[3] == "assistant\na <¦im_end¦> b<|im_end|>\n"


def test_a_package_is_read_without_being_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dpkg-deb's part is played by cat."""
    deb = tmp_path / "pkg_1%3a2-3_all.deb"
    with tarfile.open(deb, "w") as archive:
        for name, text in [("b.html", PAGE), ("a.html", "<p>First by name.</p>"), ("c.png", "x")]:
            info = tarfile.TarInfo(f"./usr/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    program = tmp_path / "dpkg-deb"
    program.write_text('#!/bin/sh\nexec cat "$2"\n')
    program.chmod(0o755)
    monkeypatch.setattr(corpus.shutil, "which", lambda name: str(program))
    found = documents(Source("pkg", "MIT", r".*\.html"), deb)
    assert [document.name for document in found] == ["pkg/usr/a.html", "pkg/usr/b.html"]
    assert corpus.version(deb) == "1:2-3"
    deb.write_bytes(b"cut short")
    with pytest.raises(PrerequisiteError, match="pkg_1"):
        documents(Source("pkg", "MIT", r".*\.html"), deb)


def test_without_apt_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.shutil, "which", lambda name: None)
    with pytest.raises(PrerequisiteError, match="no apt-get"):
        corpus.download(sources(), tmp_path)


def test_every_source_says_its_licence() -> None:
    assert all(source.licence and source.files for source in sources())
    assert len({source.package for source in sources()}) == len(sources()) > 30
