"""Weights from safetensors into a module, one tensor at a time, every one accounted for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from difyops.engine.layout import DAMAGED, INDEX, indexed, shards
from difyops.errors import PrerequisiteError

_log = logging.getLogger(__name__)


class Tensors(Protocol):
    """Named tensors, read when asked for; `where` is their file or directory, for messages."""

    @property
    def where(self) -> Path: ...
    def names(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def get(self, name: str) -> Tensor: ...


class Checkpoint:
    """The safetensors of a directory: `model.safetensors`, or the shards that its index names.

    Headers are read and checked at once, tensors when they are asked for. Raises
    PrerequisiteError naming the file: absent, truncated, damaged, or at odds with the index.
    """

    def __init__(self, directory: Path) -> None:
        self.where = directory
        self._files: dict[str, Path] = {}  # tensor -> its file
        self._open: dict[Path, Any] = {}
        for path in shards(directory):
            self._add(path)
        for name, path in indexed(directory).items():
            if self._files.get(name) != path:
                raise PrerequisiteError(
                    f"{directory / INDEX}: {name} is not in {path.name}", DAMAGED
                )

    def _add(self, path: Path) -> None:
        try:
            opened: Any = safe_open(path, framework="pt")
            names: list[str] = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise PrerequisiteError(f"{path}: cannot be read: {error}", DAMAGED) from error
        self._open[path] = opened
        for name in names:
            if name in self._files:
                raise PrerequisiteError(
                    f"{path}: {name} is in {self._files[name].name}, too", "remove one of the files"
                )
            self._files[name] = path

    def names(self) -> Iterable[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def get(self, name: str) -> Tensor:
        """The tensor called `name`, on the CPU, as it is stored."""
        tensor: Tensor = self._open[self._files[name]].get_tensor(name)
        return tensor


def fill(
    model: nn.Module,
    checkpoint: Tensors,
    rename: Callable[[str], str | None],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Give a module that was made on the meta device its weights, in `dtype` on `device`.

    `rename` is a family's (see models.Family). Parameters and persistent buffers are filled; what
    is no floating-point number keeps its dtype. Tensors that the module ties get one memory, and a
    checkpoint may hold them once or, if they are equal, several times. Raises PrerequisiteError
    naming tensors that are missing, unknown, or of another shape or kind.
    """
    sources = _sources(checkpoint, rename, model.state_dict(keep_vars=True))
    _leave_out(model, sources)
    places = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for place, slot in places.items():
        aliases.setdefault(id(slot), []).append(place)
    _none_missing(checkpoint, [group for group in aliases.values() if not sources.keys() & group])
    for group in aliases.values():
        first, *copies = [sources[place] for place in group if place in sources]
        slot = places[group[0]]
        stored = _checked(checkpoint, first, slot)
        for copy in copies:
            if not torch.equal(stored, _checked(checkpoint, copy, slot)):
                raise PrerequisiteError(
                    f"{checkpoint.where}: {copy} differs from {first}, to which the config ties it",
                    "config.json's tie_word_embeddings is perhaps wrong",
                )
        filled = torch.empty_like(
            slot, dtype=dtype if slot.is_floating_point() else slot.dtype, device=device
        )
        filled.copy_(stored)
        if isinstance(slot, nn.Parameter):
            filled = nn.Parameter(filled, requires_grad=False)
        for place in group:
            path, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(path), leaf, filled)


def _leave_out(model: nn.Module, sources: Mapping[str, str]) -> None:
    """Drop what plain decoding does not run and the checkpoint lacks as a whole: transformers
    saves a model without the multi-token prediction that its config still names."""
    extra = getattr(model, "extra", None)
    if not isinstance(extra, nn.ModuleDict):
        return
    for name in list(extra):
        if not any(place.startswith(f"extra.{name}.") for place in sources):
            _log.warning("the checkpoint has no weights for %s: served without it", name)
            del extra[name]


def _sources(
    checkpoint: Tensors, rename: Callable[[str], str | None], places: Collection[str]
) -> dict[str, str]:
    """Place in the module -> tensor in the checkpoint."""
    sources: dict[str, str] = {}
    unknown = []
    for name in checkpoint.names():
        try:
            place = rename(name)
        except KeyError:
            unknown.append(name)
            continue
        if place is None:
            continue
        if place not in places:
            unknown.append(name)
        elif place in sources:
            raise PrerequisiteError(f"{checkpoint.where}: {name} and {sources[place]} are the same")
        else:
            sources[place] = name
    if unknown:
        raise PrerequisiteError(
            f"{checkpoint.where}: {_listed(unknown)}: no such tensor in a model of this config",
            "is config.json that of another model?",
        )
    return sources


def _none_missing(checkpoint: Tensors, missing: list[list[str]]) -> None:
    if missing:
        raise PrerequisiteError(
            f"{checkpoint.where}: no tensor for {_listed([group[0] for group in missing])}",
            "the checkpoint is incomplete, or config.json is that of another model",
        )


def _checked(checkpoint: Tensors, name: str, slot: Tensor) -> Tensor:
    if (shape := checkpoint.shape(name)) != tuple(slot.shape):
        raise PrerequisiteError(
            f"{checkpoint.where}: {name} has shape {list(shape)}, the config asks for "
            f"{list(slot.shape)}",
            "config.json and the weights are of different models",
        )
    try:
        stored = checkpoint.get(name)
    except (SafetensorError, OSError) as error:
        raise PrerequisiteError(f"{checkpoint.where}: {name}: {error}", DAMAGED) from error
    fits = stored.is_floating_point() if slot.is_floating_point() else stored.dtype == slot.dtype
    if not fits:
        raise PrerequisiteError(
            f"{checkpoint.where}: {name} holds {str(stored.dtype).removeprefix('torch.')}",
            "quantised safetensors are not supported; use the original weights",
        )
    return stored


def _listed(names: Collection[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
