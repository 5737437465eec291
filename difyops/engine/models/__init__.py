"""The checkpoint families. A new family is one file here and one line in `REGISTRY`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from difyops.errors import UsageError

if TYPE_CHECKING:
    from difyops.engine.models.decoder import Decoder


@dataclass(frozen=True)
class Family:
    """How a checkpoint of one family is read.

    `build` makes the module from config.json's content and raises UsageError naming a key that it
    cannot honour. `rename` maps a tensor's name in the checkpoint to a parameter's name in the
    module; None means that it is known and not wanted; a name it does not know raises KeyError.
    """

    name: str
    build: Callable[[Mapping[str, Any]], Decoder]
    rename: Callable[[str], str | None]


#: model_type in config.json -> the module with its `FAMILY`.
REGISTRY: Mapping[str, str] = MappingProxyType(
    {
        "mamba2": "difyops.engine.models.mamba2",
        "qwen3_5": "difyops.engine.models.qwen35",
        "qwen3_5_text": "difyops.engine.models.qwen35",
        "difyops_native": "difyops.engine.models.native",
        "llama": "difyops.engine.models.llama",
    }
)


def check_family(config: Mapping[str, Any]) -> str:
    """The model_type of a config. Raises UsageError, naming the known ones, for any other."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in REGISTRY:
        return kind
    said = "model_type is missing" if kind is None else f"model_type: {kind!r} is not served"
    raise UsageError(f"config.json: {said}", f"families: {', '.join(sorted(REGISTRY))}")


def family(config: Mapping[str, Any]) -> Family:
    """The family of a config. Raises UsageError as check_family."""
    found: Family = importlib.import_module(REGISTRY[check_family(config)]).FAMILY
    return found
