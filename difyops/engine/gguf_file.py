"""The GGUF container: metadata and tensors, from a file nobody vouches for.

The header is read here and not by gguf.GGUFReader: that one makes an array object of each of a
vocabulary's strings (2.5 s for 49,152 tokens), and a count that lies sends it round a loop without
end. The package's tables of types and its dequantiser are used as they are. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray

from difyops.errors import PrerequisiteError

_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}
_AGAIN = "download it again; a GGUF file of version 2 or 3 is needed"
#: Far above every model there is; a header that claims more is damaged.
_MOST_ENTRIES = 1 << 16
_MOST_ELEMENTS = 1 << 23


class _Damaged(Exception):
    """What is wrong with the file, in words."""


@dataclass(frozen=True)
class TensorInfo:
    """`shape` is row-major, as in numpy and torch; `start` and `size` are bytes in the file."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


class GgufFile:
    """A memory-mapped GGUF file: `metadata` by key, `tensors` by name.

    Raises PrerequisiteError naming the file and what is wrong with it. Reading a header takes time
    and memory in proportion to the file, whatever it claims.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise PrerequisiteError(f"{path}: {error.strerror}") from error
        except ValueError:
            raise PrerequisiteError(f"{path}: the file is empty", _AGAIN) from None
        try:
            self.metadata, self.tensors = _read(_Cursor(self._data))
        except _Damaged as error:
            raise PrerequisiteError(f"{path}: {error}", _AGAIN) from error

    def tensor(self, name: str) -> NDArray[np.float32]:
        """The values of one tensor, dequantised to a new float32 array.

        Raises PrerequisiteError for a quantisation that cannot be read, and for values that are no
        numbers.
        """
        info = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, info.size, info.start)
        row = info.size // math.prod(info.shape[:-1])
        try:
            values = dequantize(raw.reshape(*info.shape[:-1], row), info.kind)
        except NotImplementedError:
            raise PrerequisiteError(
                f"{self.path}: {name}: the quantisation {info.kind.name} cannot be read",
                "use a file with another one, for example Q4_K_M or Q8_0",
            ) from None
        values = np.array(values, dtype=np.float32).reshape(info.shape)
        if not np.isfinite(values).all():
            raise PrerequisiteError(f"{self.path}: {name} holds values that are no numbers", _AGAIN)
        return values


def check_architecture(file: GgufFile) -> None:
    """Raises PrerequisiteError for a file of a model that the engine does not read from GGUF."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise PrerequisiteError(
            f"{file.path}: general.architecture: {architecture!r} cannot be read from GGUF",
            "known architectures: llama; others load from safetensors",
        )
    if file.metadata.get("split.count", 1) != 1:
        raise PrerequisiteError(
            f"{file.path}: one part of {file.metadata['split.count']}",
            "join them: llama-gguf-split --merge",
        )


class _Cursor:
    """A place in the header that cannot be moved past the end of the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0
        self.what = "header"  # being read; for messages

    def skip(self, size: int) -> int:
        """Move over `size` bytes and return where they begin."""
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise _Damaged(
                f"truncated or damaged: {self.what} would end at byte {self.at}, "
                f"the file has {len(self.data)}"
            )
        return start

    def number(self, code: str) -> Any:
        layout = struct.Struct(f"<{code}")
        return layout.unpack_from(self.data, self.skip(layout.size))[0]

    def text(self) -> str:
        start = self.skip(self.number("Q"))
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise _Damaged(f"damaged: {self.what} holds text that is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A number, a text, a list of texts or a numpy array of numbers."""
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            return self._array(self.number("I"), self.number("Q"))
        return self._numbers(kind, 1)[0].item()

    def _array(self, kind: int, count: int) -> Any:
        if count > _MOST_ELEMENTS:
            raise _Damaged(f"damaged: {self.what} claims {count} elements")
        if kind == GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> NDArray[Any]:
        if kind not in _NUMBERS:
            raise _Damaged(f"damaged: {self.what} is of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[GGUFValueType(kind)])
        return np.frombuffer(self.data, dtype, count, self.skip(dtype.itemsize * count))


def _read(cursor: _Cursor) -> tuple[Mapping[str, Any], Mapping[str, TensorInfo]]:
    if cursor.data[: cursor.skip(4) + 4] != b"GGUF":
        raise _Damaged("not a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise _Damaged(f"GGUF version {version} cannot be read (a big-endian file looks so, too)")
    tensors, keys = cursor.number("Q"), cursor.number("Q")
    if max(tensors, keys) > _MOST_ENTRIES:
        raise _Damaged(f"damaged: the header claims {keys} keys and {tensors} tensors")
    metadata = _metadata(cursor, keys)
    return metadata, _tensors(cursor, tensors, metadata.get("general.alignment", 32))


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(1, count + 1):
        cursor.what = f"metadata key {number} of {count}"
        key = cursor.text()
        cursor.what = key
        if key in metadata:
            raise _Damaged(f"damaged: {key} is there twice")
        metadata[key] = cursor.value(cursor.number("I"))
    return metadata


def _tensors(cursor: _Cursor, count: int, alignment: object) -> dict[str, TensorInfo]:
    if not isinstance(alignment, int) or alignment not in (8, 16, 32, 64, 128, 256, 4096):
        raise _Damaged(f"damaged: general.alignment is {alignment!r}")
    tensors: dict[str, TensorInfo] = {}
    for number in range(1, count + 1):
        cursor.what = f"the description of tensor {number} of {count}"
        name = cursor.text()
        cursor.what = f"the description of {name}"
        if name in tensors:
            raise _Damaged(f"damaged: the tensor {name} is there twice")
        tensors[name] = _tensor(cursor, name, alignment)
    first = -(-cursor.at // alignment) * alignment
    placed = {}
    for name, info in tensors.items():
        cursor.what, cursor.at = f"the tensor {name}", first + info.start
        placed[name] = TensorInfo(info.shape, info.kind, cursor.skip(info.size), info.size)
    return placed


def _tensor(cursor: _Cursor, name: str, alignment: int) -> TensorInfo:
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= 4:
        raise _Damaged(f"damaged: {name} has {dimensions} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    kind, start = cursor.number("I"), cursor.number("Q")
    if kind not in GGML_QUANT_SIZES:
        raise _Damaged(f"{name} is of the unknown type {kind}")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not all(shape) or shape[-1] % block or start % alignment:
        raise _Damaged(f"damaged: {name} of shape {list(shape)} at byte {start} cannot be")
    return TensorInfo(shape, GGMLQuantizationType(kind), start, math.prod(shape) // block * size)
