"""What a request may say: `/v1/embeddings` in full, and what is checked of a chat request."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, ValidationError

from difyops.serving.errors import bad_field, unsupported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_INPUTS = 2048

# fail_fast: pydantic would otherwise write an error for each of a million ids.
_Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
_Ids = Annotated[list[StrictInt], Field(fail_fast=True)]
_Tokens = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]


class EmbeddingRequest(BaseModel):
    """OpenAI's fields; any other is refused by name rather than ignored."""

    model_config = ConfigDict(extra="forbid")

    model: StrictStr
    input: StrictStr | _Texts | _Ids | Annotated[list[_Tokens], Field(fail_fast=True)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: StrictInt | None = None
    #: OpenAI's tag of an end user; it changes no answer.
    user: StrictStr | None = None

    def inputs(self) -> list[str | list[int]]:
        """One entry a vector. Raises ApiError (400) for none, too many, or an empty one."""
        given: Any = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        if not 1 <= len(given) <= MAX_INPUTS:
            raise bad_field("input", f"{len(given)} inputs; 1 to {MAX_INPUTS} are accepted")
        empty = next((i for i, item in enumerate(given) if not item), None)
        if empty is not None:
            raise bad_field("input", f"input {empty} is empty")
        return list(given)


def parse_embedding(fields: dict[str, Any]) -> EmbeddingRequest:
    """Raises ApiError (400) naming the first field that is wrong."""
    try:
        return EmbeddingRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "body"
        if field == "input":
            raise bad_field(
                field, "a string, a list of strings, or one or more lists of token ids is needed"
            ) from None
        message = "is not supported" if first["type"] == "extra_forbidden" else first["msg"]
        raise bad_field(field, message) from None


def encode_vector(vector: NDArray[np.float32], form: str | None) -> list[float] | str:
    """A row of float32 as JSON numbers, or as base64 of its little-endian bytes."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in vector]


def model_name(fields: dict[str, Any]) -> str:
    """The `model` field. Raises ApiError (400) when it is absent or no string."""
    name = fields.get("model")
    if not isinstance(name, str) or not name:
        raise bad_field("model", "the id of a model is needed")
    return name


def model_entry(name: str, context: int, created: int, engine: str) -> dict[str, Any]:
    """An entry of `/v1/models`; `context` is in tokens, `created` in seconds since 1970. `engine`
    says who answers: native, llamacpp or onnxruntime."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "difyops",
        "engine": engine,
        "context_length": context,
        "max_model_len": context,
    }


def check_chat(fields: dict[str, Any], *, tools: bool) -> None:
    """Refuse what the engine would take and ignore. Raises ApiError (400)."""
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_field("messages", "a list of at least one message is needed")
    if tools:
        return
    for field in ("tools", "functions"):
        if fields.get(field):
            raise unsupported(field, f"{fields['model']} does not call tools")
