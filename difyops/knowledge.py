"""Proof that Dify's knowledge works: upload, worker, embedding, vector store and retrieval."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from difyops.console import Change, Console, Json
from difyops.errors import DifyopsError
from difyops.transport import excerpt
from difyops.wire import Progress, ProofError

DATASET = "difyops sample knowledge"
FILE = "difyops-sample.txt"
SEPARATOR = "\n\n"
#: Passages that share no words, so that even a small embedding model tells them apart.
PASSAGES = (
    "The lighthouse keeper's cat is called Marzipan and sleeps in the lamp room.",
    "Bread dough rises faster in a warm kitchen, and doubles in about an hour.",
    "The night train to Lisbon leaves from platform nine at half past ten.",
)
QUESTION = "From which platform does the train depart?"
RIGHT = PASSAGES[2]


@dataclass(frozen=True)
class KnowledgeProof:
    """What retrieval found first, and how long indexing took (0 when it was indexed before)."""

    dataset_id: str
    document_id: str
    change: Change
    passage: str
    score: float
    index_seconds: float
    search_seconds: float


def prove_knowledge(
    console: Console,
    embedding: str,
    progress: Progress,
    *,
    seconds: float = 180.0,
    poll: float = 0.5,
    sleep: Callable[[float], None] = time.sleep,
) -> KnowledgeProof:
    """Index one small document and ask for a passage of it. `console` is logged in.

    The dataset is made first and by name, the document second: a run that was interrupted between
    the two is completed by the next, never repeated beside it.
    """
    start = time.monotonic()
    dataset, change = _dataset(console, embedding)
    dataset_id = str(dataset["id"])
    document_id, document_change = _document(console, dataset_id, embedding, progress)
    if change == "same":
        change = document_change
    _wait(console, dataset_id, document_id, progress, start + seconds, seconds, poll, sleep)
    indexed = time.monotonic()
    progress("knowledge", f"asking: {QUESTION}")
    records = console.hit_testing(dataset_id, QUESTION, top_k=len(PASSAGES))
    found = [str(record["segment"]["content"]).strip() for record in records]
    if not found or found[0] != RIGHT:
        raise ProofError(
            "retrieval does not find the right passage first"
            if found
            else "retrieval finds nothing in an indexed document",
            f"check the vector store, and that {embedding} is an embedding model: "
            f"delete the dataset `{DATASET}` in Dify to index it anew",
            (f"asked: {QUESTION}", f"expected: {RIGHT}", f"found: {found}"),
        )
    return KnowledgeProof(
        dataset_id=dataset_id,
        document_id=document_id,
        change=change,
        passage=found[0],
        score=float(records[0]["score"]),
        index_seconds=0.0 if change == "same" else round(indexed - start, 3),
        search_seconds=round(time.monotonic() - indexed, 3),
    )


def _dataset(console: Console, embedding: str) -> tuple[Json, Change]:
    present = console.datasets(DATASET)
    if not present:
        return console.create_dataset(DATASET), "created"
    used = present[0].get("embedding_model")
    if used and used != embedding:
        raise DifyopsError(
            f"the dataset `{DATASET}` was indexed with {used}, not with {embedding}",
            "delete it in Dify (Knowledge): it holds nothing but the sample, and is made anew",
        )
    return present[0], "same"


def _document(
    console: Console, dataset_id: str, embedding: str, progress: Progress
) -> tuple[str, Change]:
    change: Change = "created"
    for document in console.documents(dataset_id):
        if document["name"] != FILE:
            continue
        if document["indexing_status"] != "error":
            return str(document["id"]), "same"
        # Dify's own retry cleans up first, and fails forever when the vector store has no table
        # yet: the sample is cheap to upload again.
        progress("knowledge", "indexing failed before, trying again")
        console.delete_document(dataset_id, str(document["id"]))
        change = "updated"
    progress("knowledge", f"uploading {FILE}")
    file_id = console.upload_file(FILE, SEPARATOR.join(PASSAGES).encode())
    return console.add_document(dataset_id, file_id, embedding, SEPARATOR), change


def _wait(
    console: Console,
    dataset_id: str,
    document_id: str,
    progress: Progress,
    deadline: float,
    seconds: float,
    poll: float,
    sleep: Callable[[float], None],
) -> None:
    told = ""
    while True:
        status = console.indexing_status(dataset_id, document_id)
        stage = str(status["indexing_status"])
        if stage == "completed":
            return
        if stage in ("error", "paused"):
            raise ProofError(
                f"indexing ended as {stage}: {excerpt(status.get('error') or 'no reason', 600)}",
                "see the worker's log; it calls the embedding model and the vector store",
                (f"document {document_id}", f"status: {dict(status)}"),
            )
        if stage != told:
            progress("knowledge", f"indexing: {stage}")
            told = stage
        if time.monotonic() > deadline:
            raise ProofError(
                f"indexing is still `{stage}` after {seconds:g} s",
                "no worker takes the task: is it running (`difyops status`), and does it consume "
                "the queue `dataset`?"
                if stage == "waiting"
                else "the worker began and did not finish: see its log",
                (f"document {document_id}", f"status: {dict(status)}"),
            )
        sleep(poll)
