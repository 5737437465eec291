"""The kinds of token mixing. A new kind is one file here and one line in `REGISTRY`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from difyops.engine.mixers.base import Mixer, RecurrentMixer
from difyops.engine.mixers.softmax import Softmax

#: name in a native config -> the class, which has `Options` and is made of (width, options).
REGISTRY: Mapping[str, type[Mixer]] = MappingProxyType(
    {
        "softmax": Softmax,
    }
)

__all__ = ["REGISTRY", "Mixer", "RecurrentMixer", "Softmax"]
