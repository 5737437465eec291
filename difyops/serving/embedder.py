"""Sentence embeddings on ONNX Runtime: mean pooling over the tokens, then L2 normalisation."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from difyops.errors import PrerequisiteError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: A text, or token ids of this model's own vocabulary.
Input = str | Sequence[int]


@dataclass(frozen=True)
class Embedded:
    """`vectors` is float32 of shape [inputs, dimensions], each row of length 1.

    `tokens` is what the model read, special tokens included; `truncated` counts the inputs that
    were longer than the model reads.
    """

    vectors: NDArray[np.float32]
    tokens: int
    truncated: int


class Embedder:
    """One ONNX encoder with its tokenizer. Blocking, and safe to call from several threads."""

    def __init__(self, session: Any, tokenizer: Any, max_tokens: int) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._inputs = {i.name for i in session.get_inputs()}
        self._output = session.get_outputs()[0].name
        self._turn = threading.Lock()
        empty = tokenizer.encode("").ids
        # What the tokenizer puts around a text: [CLS] before, [SEP] after.
        self._before, self._after = empty[:1], empty[1:]
        self.vocabulary = int(tokenizer.get_vocab_size())
        self.max_tokens = max_tokens
        # As long as an input may be: a model with fewer positions fails here and not in service.
        self.dimensions = int(self._run(self._around([0] * max_tokens)).shape[0])

    @classmethod
    def load(
        cls, model: Path, tokenizer: Path, max_tokens: int, threads: int | None = None
    ) -> Embedder:
        """Load and warm. `max_tokens` counts special tokens; `threads` None: ONNX Runtime's choice.

        Raises PrerequisiteError naming the file that cannot be used.
        """
        import onnxruntime
        from tokenizers import Tokenizer

        for path in (model, tokenizer):
            if not path.is_file():
                raise PrerequisiteError(f"cannot load the embedding model: no file {path}")
        try:
            words = Tokenizer.from_file(str(tokenizer))
            # The file's own settings pad and cut to 128 tokens, and say nothing of it.
            words.no_padding()
            words.no_truncation()
        except Exception as error:
            raise PrerequisiteError(
                f"cannot load the tokenizer {tokenizer}: {_line(error)}"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        # Idle threads sleep: by default they would spin on the CPUs that chat and Dify need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
            return cls(session, words, max_tokens)
        except Exception as error:
            raise PrerequisiteError(
                f"cannot load the embedding model {model}: {_line(error)}"
            ) from error

    def embed(self, inputs: Sequence[Input]) -> Embedded:
        """Embed each input by itself, so that a vector never depends on its neighbours.

        One at a time is also the fastest on a CPU: a batch pads to its longest member. An input
        longer than `max_tokens` is cut at its end and counted. Raises ValueError for a token id
        outside the vocabulary.
        """
        import numpy as np

        rows = []
        tokens = truncated = 0
        for item in inputs:
            ids, cut = self._encode(item)
            tokens += len(ids)
            truncated += cut
            rows.append(self._run(ids))
        return Embedded(np.stack(rows), tokens, truncated)

    def _encode(self, item: Input) -> tuple[list[int], bool]:
        """Token ids with the special tokens, and whether the input had to be cut."""
        if isinstance(item, str):
            ids = [int(i) for i in self._tokenizer.encode(item).ids]
            inner = ids[len(self._before) : len(ids) - len(self._after)]
        else:
            inner = list(item)
            wrong = next((i for i in inner if not 0 <= i < self.vocabulary), None)
            if wrong is not None:
                raise ValueError(
                    f"token {wrong} is outside this model's vocabulary of {self.vocabulary}; "
                    "send text, or ids of this model's tokenizer"
                )
        whole = self._around(inner)
        return whole, len(whole) < len(self._before) + len(inner) + len(self._after)

    def _around(self, inner: list[int]) -> list[int]:
        room = self.max_tokens - len(self._before) - len(self._after)
        return [*self._before, *inner[:room], *self._after]

    def _run(self, ids: list[int]) -> NDArray[np.float32]:
        """One sequence -> one unit vector, float32 of shape [dimensions]."""
        import numpy as np

        row = np.asarray([ids], dtype=np.int64)
        feed = {
            "input_ids": row,
            "attention_mask": np.ones_like(row),
            "token_type_ids": np.zeros_like(row),
        }
        # A turn is one sequence: two requests alternate instead of fighting over the CPUs.
        with self._turn:
            hidden = self._session.run(
                [self._output], {k: v for k, v in feed.items() if k in self._inputs}
            )[0]
        pooled = hidden[0].mean(axis=0)
        unit: NDArray[np.float32] = (pooled / max(float(np.linalg.norm(pooled)), 1e-12)).astype(
            np.float32
        )
        return unit


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
