"""The engine: one thread that schedules, runs the model, samples and hands out."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from difyops.engine import sample
from difyops.engine.models.decoder import Decoder
from difyops.engine.request import EngineStopped, FinishReason, Output, Request, TokenLogprob
from difyops.engine.scheduler import Batch, Limits, Scheduler
from difyops.engine.slots import IntegrityError
from difyops.engine.state import StatePool

log = logging.getLogger("difyops.engine")

#: Takes what one step adds to a request; called on the engine's thread, so it must not block.
Deliver = Callable[[Output], None]


@dataclass
class Counters:
    """What has happened since the start."""

    steps: int = 0
    prompt_tokens: int = 0  # read, again after a preemption
    generated_tokens: int = 0
    finished: dict[FinishReason, int] = field(
        default_factory=lambda: dict.fromkeys(FinishReason, 0)
    )


@dataclass(frozen=True)
class Stats:
    """The engine at one moment. Bytes are those allocated."""

    running: int
    waiting: int
    slots: int
    free_slots: int
    pages: int
    free_pages: int
    preemptions: int
    slot_bytes: int
    token_bytes: int
    state_bytes: int
    counters: Counters


class Engine:
    """A model with its slots, its queue and its thread.

    `slots` sequences run at a time, each of at most `context` tokens. `pages` bounds the keys and
    values of softmax layers over all sequences; without it every slot can be full.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        slots: int,
        context: int,
        pages: int | None = None,
        prefill_tokens: int = 512,
        max_waiting: int = 256,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.device = model.embed.weight.device
        self.context = context
        self.pool = StatePool(
            model.state_specs(), slots=slots, context=context, pages=pages, device=self.device
        )
        self._scheduler = Scheduler(
            self.pool.table, Limits(context, prefill_tokens=prefill_tokens, max_waiting=max_waiting)
        )
        self._deliver: dict[Request, Deliver] = {}
        self._counters = Counters()
        #: Guards the scheduler; never held while the model runs.
        self._turn = threading.Condition()
        self._stopping = False
        #: Why the engine ended by itself; None while it has not.
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to run requests."""
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request. `deliver` is called for every step that adds to it, last with a finish.

        Raises QueueFull, EngineStopped, or ValueError for a prompt that does not fit.
        """
        with self._turn:
            if self._stopping:
                raise EngineStopped(self.failure or "the engine is stopping")
            self._scheduler.submit(request)
            self._deliver[request] = deliver
            self._turn.notify()

    def cancel(self, request: Request) -> None:
        """Its client has left: the slot is free at the next step."""
        with self._turn:
            request.cancelled = True
            self._turn.notify()

    def stop(self) -> None:
        """End after the step that runs now; what has not finished ends with an error."""
        with self._turn:
            self._stopping = True
            self._turn.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def stats(self) -> Stats:
        with self._turn:
            table, scheduler = self.pool.table, self._scheduler
            return Stats(
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                slots=table.slots,
                free_slots=table.free_slots,
                pages=table.pages,
                free_pages=table.free_pages,
                preemptions=scheduler.preemptions,
                slot_bytes=self.pool.slot_bytes,
                token_bytes=self.pool.token_bytes,
                state_bytes=self.pool.bytes,
                counters=Counters(
                    **{**vars(self._counters), "finished": dict(self._counters.finished)}
                ),
            )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run the model's forms once, before there are requests. Raises what they raise."""
        slot = self.pool.table.acquire()
        if slot is None or not self.pool.table.grow(slot, 3):
            raise ValueError("an engine needs a slot, and pages for it")
        self.pool.sync()
        slots = self._tensor([slot])
        hidden = self.model.prefill(self._tensor([0, 0]), self.pool, slots, self._tensor([0, 2]))
        hidden = torch.cat((hidden, self.model.step(self._tensor([0]), self.pool, slots)))
        self.model.logits(hidden)
        self.pool.release(slot)

    @torch.inference_mode()
    def _main(self) -> None:
        try:
            while (batch := self._next()) is not None:
                try:
                    choices = self._run(batch)
                except IntegrityError:
                    raise
                except Exception as error:
                    log.exception("a step failed")
                    self._fail(batch, f"the model failed: {type(error).__name__}")
                else:
                    self._hand_out(batch, choices)
        except Exception as error:
            log.exception("the engine ends")
            self.failure = f"{type(error).__name__}: {error}"
        self._end()

    def _next(self) -> Batch | None:
        """The next work, waited for; None when the engine is to end."""
        with self._turn:
            while not self._stopping:
                for request in self._scheduler.cancelled():
                    self._finish(request, Output(finish=FinishReason.CANCELLED))
                if batch := self._scheduler.next():
                    self.pool.sync()
                    return batch
                self.pool.check()
                self._turn.wait()
            return None

    def _run(self, batch: Batch) -> list[tuple[Request, TokenLogprob | None]]:
        """The model over the batch, and the tokens chosen after it."""
        hidden, requests = [], []
        if batch.prefill:
            hidden.append(self._prefill(batch))
            requests += [span.request for span in batch.prefill if span.last]
        if batch.decode:
            tokens = self._tensor([request.tokens[-1] for request in batch.decode])
            hidden.append(self.model.step(tokens, self.pool, self._slots(batch.decode)))
            requests += batch.decode
        self._scheduler.computed(batch)
        if not requests:
            return []
        logits = self.model.logits(torch.cat(hidden))
        return list(zip(requests, sample.choose(logits, requests), strict=True))

    def _prefill(self, batch: Batch) -> Tensor:
        """Hidden states behind the prompts that are read to their end: [R, width]."""
        tokens, bounds, last = [], [0], []
        for span in batch.prefill:
            tokens += span.request.tokens[span.start : span.stop]
            bounds.append(len(tokens))
            if span.last:
                last.append(len(tokens) - 1)
        slots = self._slots([span.request for span in batch.prefill])
        hidden = self.model.prefill(self._tensor(tokens), self.pool, slots, self._tensor(bounds))
        return hidden[self._tensor(last)]

    def _hand_out(
        self, batch: Batch, choices: Sequence[tuple[Request, TokenLogprob | None]]
    ) -> None:
        now = time.monotonic()
        with self._turn:
            self._counters.steps += 1
            self._counters.prompt_tokens += sum(s.stop - s.start for s in batch.prefill)
            for request, choice in choices:
                if request.cancelled:  # it left while the model ran
                    continue
                try:
                    output = self._accept(request, choice, now)
                except Exception as error:
                    log.exception("request %d failed", request.number)
                    output = Output(finish=FinishReason.ERROR, error=f"the engine failed: {error}")
                if output.finish is not None:
                    self._finish(request, output)
                else:
                    self._deliver[request](output)

    def _accept(self, request: Request, choice: TokenLogprob | None, now: float) -> Output:
        """Take a token in: what it adds to the text, and whether it is the last."""
        if choice is None:
            return Output(finish=FinishReason.ERROR, error="the model's scores are not numbers")
        token, params = choice.token, request.sampling
        self._counters.generated_tokens += 1
        request.first_token_at = request.first_token_at or now
        request.last_token_at = now
        if token in params.stop_ids:
            return Output(text=request.text.flush(), finish=FinishReason.STOP)
        request.tokens.append(token)
        text = request.text.push(token)
        finish = None
        if request.constraint is not None:
            request.constraint.advance(token)
        if request.text.stopped or (request.constraint and request.constraint.finished):
            finish = FinishReason.STOP
        elif request.count >= params.max_tokens or len(request.tokens) >= self.context:
            finish = FinishReason.LENGTH
        if finish is not None:
            text += request.text.flush()
        logprobs = (choice,) if params.logprobs is not None else ()
        return Output(text=text, tokens=(token,), logprobs=logprobs, finish=finish)

    def _finish(self, request: Request, output: Output) -> None:
        """The request's last output. The turn is held."""
        if output.finish is None:
            raise ValueError("a last output says why it is the last")
        self._scheduler.finish(request, output.finish)
        self._counters.finished[output.finish] += 1
        self._deliver.pop(request)(output)

    def _fail(self, batch: Batch, error: str) -> None:
        """A step went wrong: its sequences' states can no longer be trusted."""
        with self._turn:
            for request in (*(span.request for span in batch.prefill), *batch.decode):
                self._finish(request, Output(finish=FinishReason.ERROR, error=error))

    def _end(self) -> None:
        with self._turn:
            self._stopping = True
            error = self.failure or "the server is stopping"
            for request in self._scheduler.everything():
                self._finish(request, Output(finish=FinishReason.ERROR, error=error))

    def _slots(self, requests: Sequence[Request]) -> Tensor:
        return self._tensor([request.slot or 0 for request in requests])

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
