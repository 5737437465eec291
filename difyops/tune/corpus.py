"""Documents out of documentation packages: download, read, reduce to plain text."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import unquote

import yaml

from difyops.errors import PrerequisiteError


@dataclass(frozen=True)
class Source:
    """One package of corpus.yaml. `files` is matched against whole paths inside the package."""

    package: str
    licence: str
    files: str


@dataclass(frozen=True)
class Section:
    """A heading ('' at a document's beginning, if there is none) and what stands under it."""

    heading: str
    paragraphs: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    """`name` is the package and the path in it."""

    name: str
    sections: list[Section]


def sources() -> list[Source]:
    """What corpus.yaml lists."""
    text = resources.files("difyops.tune").joinpath("corpus.yaml").read_text(encoding="utf-8")
    return [Source(**entry) for entry in yaml.safe_load(text)]


def download(wanted: Sequence[Source], folder: Path) -> dict[str, Path]:
    """Package -> its .deb in `folder`; what lies there already is not fetched again.

    Raises PrerequisiteError where there is no apt, or naming the packages it does not have.
    """
    if not (apt := shutil.which("apt-get")):
        raise PrerequisiteError("there is no apt-get here", "run this on Debian or Ubuntu")
    folder.mkdir(parents=True, exist_ok=True)
    for source in wanted:
        if not list(folder.glob(f"{source.package}_*.deb")):
            # One at a time: apt-get downloads nothing at all when it does not know one of them.
            subprocess.run([apt, "download", "-qq", source.package], cwd=folder, check=False)
    found = {s.package: sorted(folder.glob(f"{s.package}_*.deb")) for s in wanted}
    if absent := [package for package, files in found.items() if not files]:
        raise PrerequisiteError(
            f"apt-get could not download {', '.join(absent)}", "apt-get update, then again"
        )
    return {package: files[-1] for package, files in found.items()}


def version(deb: Path) -> str:
    """As in the file's name, where apt writes a colon as %3a."""
    return unquote(deb.name.split("_")[1])


def documents(source: Source, deb: Path) -> list[Document]:
    """The package's documents in English, in the order of their paths, those without text left
    out. Nothing is unpacked to disk. Raises PrerequisiteError for a file that is no package."""
    wanted = re.compile(source.files)
    made = []
    program = [shutil.which("dpkg-deb") or "dpkg-deb", "--fsys-tarfile", str(deb)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as package:
                for path, text in _texts(package, wanted):
                    sections = read(path, text)
                    if any(section.paragraphs for section in sections):
                        made.append(Document(f"{source.package}/{path}", sections))
        except tarfile.TarError as error:
            raise PrerequisiteError(
                f"{deb}: {error}", "remove it, and it is fetched again"
            ) from None
    return sorted(made, key=lambda document: document.name)


def _texts(package: tarfile.TarFile, wanted: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Path and content of the files that are wanted; a final .gz is taken off both."""
    for member in package:
        path = member.name.removeprefix("./")
        file = package.extractfile(member) if member.isfile() else None
        if file is not None and wanted.fullmatch(path):
            data = gzip.decompress(file.read()) if path.endswith(".gz") else file.read()
            yield path.removesuffix(".gz"), data.decode("utf-8", "replace")


def read(path: str, text: str) -> list[Section]:
    """The sections of a file, by its suffix: HTML (and Mallard pages), POD, or plain text."""
    if path.endswith(".pod"):
        found = _pod(text)
    elif path.endswith(".txt"):
        found = [Section("", [part for part in re.split(r"\n\s*\n", text) if part.strip()])]
    else:
        reader = _Html()
        reader.feed(text)
        reader.close()
        found = reader.sections
    return [Section(s.heading, [p for p in s.paragraphs if english(p)]) for s in found]


def english(paragraph: str) -> bool:
    """Whether it may be English: nearly all ASCII, and some of it letters."""
    letters = sum(character.isalpha() for character in paragraph)
    ascii_only = sum(character < "\x7f" for character in paragraph)
    return letters >= 2 and ascii_only >= 0.97 * len(paragraph) and letters >= len(paragraph) // 4


class _Html(HTMLParser):
    """Blocks of text under headings. What is around a page's text is left out."""

    _HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "title"})
    _BLOCKS = frozenset(
        {"p", "li", "dt", "dd", "td", "th", "tr", "table", "div", "section", "article", "ul", "ol",
         "dl", "blockquote", "item", "page", "note", "steps", "br", "hr", "body", "figure"}
    )  # fmt: skip
    _LEFT_OUT = frozenset(
        {"head", "script", "style", "nav", "footer", "header", "form", "button", "svg", "aside",
         "select", "noscript", "info", "math"}
    )  # fmt: skip
    _FURNITURE = re.compile(
        r"(?<!with)sidebar|navigation|navheader|navfooter|toc\b|toctree|related|footer|breadcrumb|headerlink"
        r"|permalink|linenos|out-of-band|srclink|skip-link|banner|genindex|apilink|langSelector"
    )
    _VOID = frozenset({"br", "hr", "img", "input", "link", "meta", "col", "area", "wbr", "source"})

    def __init__(self) -> None:
        super().__init__()
        self.sections = [Section("")]
        self._text: list[str] = []
        self._kept_lines = 0  # nested <pre>
        self._skipped: str | None = None  # the element that is left out,
        self._depth = 0  # and how many of its name are open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skipped is not None:
            self._depth += tag == self._skipped
            return
        marks = " ".join(value or "" for name, value in attrs if name in ("class", "id", "role"))
        if tag in self._LEFT_OUT or (tag not in ("body", "html") and self._FURNITURE.search(marks)):
            if tag not in self._VOID:
                self._skipped, self._depth = tag, 1
            return
        if tag == "pre" or tag in self._HEADINGS or (tag in self._BLOCKS and not self._kept_lines):
            self._end_block()
            self._kept_lines += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self._skipped is not None:
            self._depth -= tag == self._skipped
            if not self._depth:
                self._skipped = None
            return
        if tag in self._HEADINGS:
            if heading := " ".join("".join(self._text).split()).strip(" ¶#"):
                self.sections.append(Section(heading))
            self._text = []
        elif tag == "pre":
            self._end_block()
            self._kept_lines = max(0, self._kept_lines - 1)
        elif tag in self._BLOCKS and not self._kept_lines:
            self._end_block()

    def handle_data(self, data: str) -> None:
        if self._skipped is None:
            self._text.append(data)

    def close(self) -> None:
        super().close()
        self._end_block()

    def _end_block(self) -> None:
        text = "".join(self._text)
        self._text = []
        if self._kept_lines:
            text = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        else:
            text = " ".join(text.split())
        if text.strip():
            self.sections[-1].paragraphs.append(text)


def _pod(text: str) -> list[Section]:
    """Perl's plain old documentation, its formatting codes taken off."""
    found = [Section("")]
    for block in re.split(r"\n\s*\n", text):
        block = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", block)
        for _ in range(3):  # codes nest
            block = re.sub(r"[A-Z]<([^<>]*)>", r"\1", block)
        command = re.match(r"=(\w+)\s*(.*)", block, re.DOTALL)
        if command and command[1].startswith("head"):
            found.append(Section(" ".join(command[2].split())))
        elif not command and block.strip():
            found[-1].paragraphs.append(block.strip("\n"))
    return found
