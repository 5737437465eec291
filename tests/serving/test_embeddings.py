"""Embeddings: what the vectors mean, their formats, and every refusal."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from .conftest import CHAT, EMBED, KEY, Running


def embed(http: httpx.Client, given: Any, **more: Any) -> httpx.Response:
    return http.post("/v1/embeddings", json={"model": EMBED, "input": given} | more)


def vectors(answer: httpx.Response) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [d["index"] for d in data] == list(range(len(data)))
    return np.array([d["embedding"] for d in data], dtype=np.float32)


def test_a_paraphrase_is_closer_than_something_else(http: httpx.Client) -> None:
    a, b, c = vectors(
        embed(
            http,
            [
                "How do I reset my password?",
                "I forgot my login credentials, what now?",
                "The recipe needs two eggs and a cup of flour.",
            ],
        )
    )
    assert a @ b > 0.5 > 0.2 > a @ c
    assert np.linalg.norm(np.stack([a, b, c]), axis=1) == pytest.approx(1, abs=1e-5)


def test_a_vector_does_not_depend_on_its_neighbours(http: httpx.Client) -> None:
    alone = vectors(embed(http, "short"))[0]
    batch = vectors(embed(http, ["a much longer text " * 20] * 9 + ["short"]))
    assert np.array_equal(batch[-1], alone)
    assert batch.shape == (10, 384)


def test_the_openai_client_and_base64(http: httpx.Client, server: Running) -> None:
    texts = ["one", "two words"]
    plain = vectors(embed(http, texts))
    coded = embed(http, texts, encoding_format="base64").json()["data"]
    decoded = [np.frombuffer(base64.b64decode(d["embedding"]), dtype="<f4") for d in coded]
    assert np.array_equal(np.stack(decoded), plain)
    # The client itself asks for base64 when it is not told otherwise.
    with openai.OpenAI(base_url=f"{server.url()}/v1", api_key=KEY, max_retries=0) as client:
        answer = client.embeddings.create(model=EMBED, input=texts)
        assert np.array_equal(np.array([d.embedding for d in answer.data], np.float32), plain)
        assert answer.usage.prompt_tokens == 3 + 4
        assert answer.model == EMBED


def test_token_arrays_are_this_models_tokens(http: httpx.Client) -> None:
    # "hello world" in the vocabulary of bert-base-uncased, without and with special tokens.
    text = vectors(embed(http, "hello world"))[0]
    assert np.array_equal(vectors(embed(http, [7592, 2088]))[0], text)
    both = vectors(embed(http, [[7592, 2088], [7592]]))
    assert np.array_equal(both[0], text) and not np.array_equal(both[1], text)


def test_truncation_is_said(http: httpx.Client, server: Running) -> None:
    short = embed(http, "word " * 254)
    assert "x-truncated-inputs" not in short.headers
    assert short.json()["usage"]["prompt_tokens"] == 256
    long = embed(http, ["word " * 255, "word", "word " * 1000])
    assert long.headers["x-truncated-inputs"] == "2"
    assert long.json()["usage"]["prompt_tokens"] == 256 + 3 + 256
    # What is cut is the end: the first 254 words alone are the whole of it.
    assert np.array_equal(vectors(long)[2], vectors(short)[0])
    assert "2 inputs truncated" in server.log


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": None}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [30522]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "a", "dimensions": 256}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "surprise": 1}, "surprise"),
    ],
)
def test_bad_requests(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": EMBED} | body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_dimensions_that_it_has_are_fine(http: httpx.Client) -> None:
    assert vectors(embed(http, "a", dimensions=384, user="someone")).shape == (1, 384)


def test_wrong_model(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"model": CHAT, "input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_not_supported")
    answer = http.post("/v1/embeddings", json={"model": "ada", "input": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_health_answers_while_embedding(http: httpx.Client, server: Running) -> None:
    """The event loop stays free: /health is quick beside a batch of seconds."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        batch = pool.submit(embed, http, ["word " * 250] * 40)
        times = []
        while not batch.done():
            times.append(httpx.get(f"{server.url()}/health").elapsed.total_seconds())
        assert batch.result().status_code == 200
    assert len(times) > 5 and sorted(times)[len(times) // 2] < 0.2
