"""llama.cpp as an oracle: the process that difyops.serving starts, asked over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Greedy:
    """What llama.cpp chose, and for the first positions (token, logprob) pairs, likeliest first.

    It reports none for a token that ends within a character, so they end before the first one.
    """

    tokens: list[int]
    likeliest: list[list[tuple[int, float]]]


@dataclass(frozen=True)
class LlamaCpp:
    client: httpx.Client
    parallel: int

    def tokenize(self, text: str, *, special: bool = True, bos: bool = False) -> list[int]:
        body = {"content": text, "add_special": bos, "parse_special": special}
        answer: list[int] = self._post("/tokenize", body)["tokens"]
        return answer

    def greedy(self, prompts: Sequence[Sequence[int]], count: int) -> list[Greedy]:
        """`count` tokens for each prompt, or fewer where an end-of-sequence token comes first."""
        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(lambda prompt: self._greedy(prompt, count), prompts))

    def _greedy(self, prompt: Sequence[int], count: int) -> Greedy:
        answer = self._post(
            "/completion",
            {
                "prompt": list(prompt),
                "n_predict": count,
                "temperature": 0,
                "samplers": ["top_k"],  # no penalties, nothing but the greatest
                "top_k": 1,
                "n_probs": 5,
                "cache_prompt": False,
                "return_tokens": True,
            },
        )
        likeliest = []
        for chosen, position in zip(
            answer["tokens"], answer["completion_probabilities"], strict=False
        ):
            if position["id"] != chosen:
                break
            likeliest.append([(top["id"], top["logprob"]) for top in position["top_logprobs"]])
        return Greedy(answer["tokens"], likeliest)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self.client.post(path, json=body).raise_for_status().json()


@contextmanager
def llama_cpp(path: Path, *, parallel: int = 1, context: int = 128) -> Iterator[LlamaCpp]:
    orders = {
        "path": str(path),
        "alias": "oracle",
        "api_key": "k",
        "context": context,
        "parallel": parallel,
        "threads": 1,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "difyops.serving.llama_child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(orders).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise AssertionError(process.communicate()[1].decode()[-2000:])
            with httpx.Client(
                base_url=json.loads(line)["address"],
                headers={"Authorization": "Bearer k"},
                timeout=120,
                trust_env=False,
                limits=httpx.Limits(max_keepalive_connections=0),
            ) as client:
                yield LlamaCpp(client, parallel)
        finally:
            process.kill()
