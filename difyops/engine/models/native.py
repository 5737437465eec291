"""difyops' own family: a small decoder whose config is a layer pattern over the mixers.

config.json, here TransNormer (arXiv:2210.10340) with 12 layers:

    {"model_type": "difyops_native", "width": 384, "vocabulary": 8192, "context": 2048,
     "mlp_hidden": 1024, "tied": true,
     "pattern": [{"mixer": "diag", "repeat": 6, "heads": 6, "head_dim": 64},
                 {"mixer": "norm", "repeat": 6, "heads": 6, "head_dim": 64}]}

Beside `mixer` and `repeat`, an entry has the mixer's options. `mtp` is such a pattern for the
blocks of a multi-token prediction module, and `mtp_modules` says how many of these there are, each
for guesses one token further ahead; `medusa` is the number of Medusa heads.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from difyops.engine.layers import GatedMLP, RMSNorm
from difyops.engine.mixers import REGISTRY
from difyops.engine.mixers.base import Options, options_from
from difyops.engine.models import Family
from difyops.engine.models.decoder import Block, Decoder, Shape
from difyops.engine.models.mtp import MedusaHead, MultiTokenPrediction
from difyops.errors import UsageError
from difyops.files import sync_dir, write_atomic


class NativeConfig(BaseModel):
    """`context` is in tokens; `mlp_hidden` 0 leaves the MLPs out. `dtype` and `eos_token_id` are
    for whoever loads the checkpoint."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_type: Literal["difyops_native"]
    width: int = Field(gt=0)
    vocabulary: int = Field(gt=0)
    context: int = Field(gt=0)
    mlp_hidden: int = Field(ge=0)
    norm_eps: float = Field(1e-6, gt=0)
    tied: bool = True
    pattern: list[dict[str, Any]] = Field(min_length=1)
    mtp: list[dict[str, Any]] = Field(default_factory=list)
    mtp_modules: int = Field(1, ge=1, le=16)
    medusa: int = Field(0, ge=0, le=16)
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    eos_token_id: int | list[int] | None = None


def build(config: Mapping[str, Any]) -> Decoder:
    """The module, with fresh weights. Raises UsageError naming the key that is wrong."""
    c = _checked(config)

    def norm() -> RMSNorm:
        return RMSNorm(c.width, c.norm_eps)

    def blocks(key: str) -> list[Block]:
        made = []
        for kind, options in _layers(c, key):
            mlp = (norm(), GatedMLP(c.width, c.mlp_hidden)) if c.mlp_hidden else ()
            made.append(Block(norm(), REGISTRY[kind](c.width, options), *mlp))
        return made

    extra = nn.ModuleDict()
    if c.mtp:
        modules = [MultiTokenPrediction(c.width, blocks("mtp"), norm) for _ in range(c.mtp_modules)]
        extra["mtp"] = modules[0] if c.mtp_modules == 1 else nn.ModuleList(modules)
    if c.medusa:
        extra["medusa"] = nn.ModuleList(MedusaHead(c.width, c.vocabulary) for _ in range(c.medusa))
    shape = Shape(c.width, c.vocabulary, c.context)
    return Decoder(shape, blocks("pattern"), norm(), tied=c.tied, extra=extra)


#: Names in the checkpoint are those in the module: `extra.mtp.fc.weight` of an only module,
#: `extra.mtp.0.fc.weight` of the first of several.
FAMILY = Family("difyops_native", build, lambda name: name)


def save(model: Decoder, config: Mapping[str, Any], folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, with the model's dtype, into `folder`: each
    whole or not at all, and first the weights. Tied weights are written once.

    Raises UsageError when `config` is not that of a native model.
    """
    _checked(config)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.tied:
        del weights["head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", weights, {"format": "pt"})
    dtype = str(model.dtype).removeprefix("torch.")
    write_atomic(folder / "config.json", json.dumps({**config, "dtype": dtype}, indent=2) + "\n")


def write_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        temporary = Path(scratch, path.name)
        save_file(dict(weights), temporary, metadata=dict(metadata))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    sync_dir(path.parent)


def _checked(config: Mapping[str, Any]) -> NativeConfig:
    """The config, its layers' options included."""
    try:
        checked = NativeConfig.model_validate(dict(config))
    except ValidationError as error:
        raise _explained(error, (), "a native config", NativeConfig.model_fields) from None
    for key in ("pattern", "mtp"):
        list(_layers(checked, key))
    if "mtp_modules" in checked.model_fields_set and not checked.mtp:
        raise _wrong(
            ("mtp_modules",),
            "needs mtp, the pattern of each module's layers: give it, or leave this out",
        )
    return checked


def _layers(config: NativeConfig, key: str) -> Iterator[tuple[str, Options]]:
    """Each layer's mixer with its options."""
    for place, entry in enumerate(getattr(config, key)):
        where = (key, place)
        values = dict(entry)
        kind, repeat = values.pop("mixer", None), values.pop("repeat", 1)
        if not isinstance(kind, str) or kind not in REGISTRY:
            raise _wrong((*where, "mixer"), f"{kind!r} is not a mixer", "mixers", REGISTRY)
        if not isinstance(repeat, int) or isinstance(repeat, bool) or repeat < 1:
            raise _wrong((*where, "repeat"), f"{repeat!r} is not a number of layers, from 1 on")
        known = REGISTRY[kind].Options.model_fields  # type: ignore[attr-defined]
        try:
            options = options_from(REGISTRY[kind], values)
        except ValidationError as error:
            raise _explained(error, where, kind, known) from None
        yield from [(kind, options)] * repeat


def _explained(
    error: ValidationError, where: tuple[str | int, ...], whose: str, known: Iterable[str]
) -> UsageError:
    first = error.errors(include_url=False)[0]
    path = (*where, *first["loc"])
    if first["type"] == "extra_forbidden":
        return _wrong(path, f"not an option of {whose}", "options", known)
    if first["type"] == "missing":
        return _wrong(path, f"missing; {whose} needs it")
    if first["type"] == "value_error":
        return _wrong(path, str(first["ctx"]["error"]))
    return _wrong(path, f"{first['msg']}, not {first['input']!r}")


def _wrong(
    path: tuple[str | int, ...], said: str, what: str = "", known: Iterable[str] = ()
) -> UsageError:
    hint = f"{what}: {', '.join(sorted(known))}" if what else None
    return UsageError(f"config.json: {'/'.join(map(str, path))}: {said}", hint)
