"""A Progress that remembers."""

from __future__ import annotations

from pathlib import Path


class Recorder:
    def __init__(self) -> None:
        self.finished_steps: list[tuple[str, str, bool]] = []  # name, detail, whether it ran
        self.failed_steps: list[tuple[str, str]] = []
        self.notes: list[str] = []

    def started(self, name: str, log: Path | None = None) -> None:
        pass

    def detail(self, name: str, text: str) -> None:
        pass

    def finished(self, name: str, detail: str, seconds: float | None) -> None:
        self.finished_steps.append((name, detail, seconds is not None))

    def failed(self, name: str, message: str, seconds: float) -> None:
        self.failed_steps.append((name, message))

    def note(self, text: str) -> None:
        self.notes.append(text)
