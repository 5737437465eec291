"""The kinds of token mixing. A new kind is one file here and one line in `REGISTRY`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from difyops.engine.mixers.base import Mixer, RecurrentMixer
from difyops.engine.mixers.diag import Diag
from difyops.engine.mixers.gated_delta import GatedDelta
from difyops.engine.mixers.linear import Linear
from difyops.engine.mixers.mamba2 import Mamba2
from difyops.engine.mixers.norm import Norm
from difyops.engine.mixers.performer import Performer
from difyops.engine.mixers.retention import Retention
from difyops.engine.mixers.softmax import Softmax

#: name in a native config -> the class, which has `Options` and is made of (width, options).
REGISTRY: Mapping[str, type[Mixer]] = MappingProxyType(
    {
        "diag": Diag,
        "gated_delta": GatedDelta,
        "linear": Linear,
        "mamba2": Mamba2,
        "norm": Norm,
        "performer": Performer,
        "retention": Retention,
        "softmax": Softmax,
    }
)

__all__ = [
    "REGISTRY",
    "Diag",
    "GatedDelta",
    "Linear",
    "Mamba2",
    "Mixer",
    "Norm",
    "Performer",
    "RecurrentMixer",
    "Retention",
    "Softmax",
]
