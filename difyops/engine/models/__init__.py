"""The checkpoint families. A new family is one file here and one line in `REGISTRY`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from difyops.engine.models.decoder import Decoder
from difyops.errors import UsageError


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


def family(config: Mapping[str, Any]) -> Family:
    """The family of a config. Raises UsageError, naming the known ones, for any other."""
    kind = str(config.get("model_type"))
    if kind not in REGISTRY:
        raise UsageError(
            f"config.json: model_type: {kind!r} is not a family that difyops serves",
            f"families: {', '.join(sorted(REGISTRY))}",
        )
    found: Family = importlib.import_module(REGISTRY[kind]).FAMILY
    return found
