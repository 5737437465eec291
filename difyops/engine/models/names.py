"""Names of tensors in checkpoints -> names of parameters, as a table of patterns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping


def renamer(table: Mapping[str, str | None]) -> Callable[[str], str | None]:
    """A family's `rename` (see models.Family) from patterns of whole names and what they become
    (`\\1` is the first group); the first that matches counts."""
    compiled = [(re.compile(pattern), becomes) for pattern, becomes in table.items()]

    def rename(name: str) -> str | None:
        for pattern, becomes in compiled:
            if found := pattern.fullmatch(name):
                return None if becomes is None else found.expand(becomes)
        raise KeyError(name)

    return rename
