"""Weights from safetensors into a module, one tensor at a time, every one accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from difyops.errors import PrerequisiteError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DAMAGED = "download it again; a file that was cut short looks so"


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
                    f"{directory / _INDEX}: {name} is not in {path.name}", _DAMAGED
                )

    def _add(self, path: Path) -> None:
        try:
            # Entered and not left: the file stays mapped as long as this object.
            opened = self._open[path] = safe_open(path, framework="pt").__enter__()
            names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise PrerequisiteError(f"{path}: cannot be read: {error}", _DAMAGED) from error
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


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint. Raises PrerequisiteError when one is absent."""
    if (directory / _INDEX).is_file():
        paths = sorted(set(indexed(directory).values()))
        if absent := [path.name for path in paths if not path.is_file()]:
            raise PrerequisiteError(
                f"{directory / _INDEX} names {', '.join(absent)}: no such file in {directory}",
                "the download is not complete",
            )
        return paths
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise PrerequisiteError(
            f"{directory} holds PyTorch's pickled weights only, and reading those can run code",
            "convert them to safetensors (transformers: save_pretrained writes it)",
        )
    raise PrerequisiteError(
        f"{directory} holds neither {_SINGLE} nor {_INDEX}",
        "give a directory in Hugging Face's layout",
    )


def indexed(directory: Path) -> dict[str, Path]:
    """Tensor -> file as the index says; empty without one."""
    path = directory / _INDEX
    if not path.is_file():
        return {}
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PrerequisiteError(f"{path}: weight_map is missing", _DAMAGED)
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise PrerequisiteError(f"{path}: {name}: {file!r} is not the name of a file beside it")
    return {name: directory / file for name, file in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises PrerequisiteError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PrerequisiteError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise PrerequisiteError(f"{path}: not a JSON object")
    return content


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
    places = model.state_dict(keep_vars=True)
    sources = _sources(checkpoint, rename, places)
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
        filled.detach_().copy_(stored)
        for place in group:
            _put(model, place, filled)


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
            f"{list(slot.shape)}"
        )
    try:
        stored = checkpoint.get(name)
    except (SafetensorError, OSError) as error:
        raise PrerequisiteError(f"{checkpoint.where}: {name}: {error}", _DAMAGED) from error
    fits = stored.is_floating_point() if slot.is_floating_point() else stored.dtype == slot.dtype
    if not fits:
        raise PrerequisiteError(
            f"{checkpoint.where}: {name} holds {str(stored.dtype).removeprefix('torch.')}",
            "quantised safetensors are not supported; use the original weights",
        )
    return stored


def _put(model: nn.Module, place: str, value: Tensor) -> None:
    path, _, leaf = place.rpartition(".")
    module = model.get_submodule(path)
    if leaf in dict(module.named_buffers(recurse=False)):
        setattr(module, leaf, value)
    else:
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _listed(names: Collection[str], most: int = 5) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
