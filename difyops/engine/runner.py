"""The engine: one thread that schedules, runs the model, samples and hands out."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from difyops.engine import graphs, kernels, sample, windows
from difyops.engine.flight import Flight
from difyops.engine.guessing import Guessing
from difyops.engine.keeping import Keeping
from difyops.engine.models.decoder import Decoder
from difyops.engine.prefix import PrefixCache
from difyops.engine.request import EngineStopped, FinishReason, Output, Request, TokenLogprob
from difyops.engine.scheduler import Batch, Limits, Scheduler, Span
from difyops.engine.slots import IntegrityError
from difyops.engine.speculate import Drafter, Read, state_specs
from difyops.engine.state import Snapshot, StatePool, StateSpec
from difyops.engine.stats import Counters, Stats
from difyops.engine.transfer import sent

log = logging.getLogger("difyops.engine")

T = TypeVar("T")
#: Takes what one step adds to a request; called on the engine's thread, so it must not block.
Deliver = Callable[[Output], None]


def joined(before: Output | None, after: Output) -> Output:
    """Two outputs of one request, the second right behind the first, as one."""
    if before is None:
        return after
    return replace(
        after,
        text=before.text + after.text,
        tokens=before.tokens + after.tokens,
        logprobs=before.logprobs + after.logprobs,
    )


class Engine:
    """A model with its slots, its queue and its thread.

    `slots` sequences run at a time, each of at most `context` tokens. `pages` bounds the keys and
    values of softmax layers over all sequences; without it every slot can be full. `drafter`
    guesses ahead: `guesses` tokens in every pass, or without it as many as pay. `prefix_bytes` of
    state are kept for prompts that begin alike. On a GPU with Triton the model is fused, and its
    plain step runs as CUDA graphs.

    Raises ValueError for `guesses` that the drafter cannot make.
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
        drafter: Drafter | None = None,
        guesses: int | None = None,
        prefix_bytes: int = 0,
    ) -> None:
        most = drafter.most if drafter is not None else 0
        if guesses is not None and not 0 <= guesses <= most:
            raise ValueError(f"guesses: {guesses} is not from 0 to {most}, what is drafted at most")
        self.model = model.eval().requires_grad_(False)
        self.device = model.embed.weight.device
        if kernels.usable(self.device, model.dtype):
            model.fuse()
        self.context = context
        self.drafter = drafter
        window = 1 + most
        self.pool = StatePool(
            model.state_specs(),
            drafting=drafter.tracks() if drafter is not None else (),
            slots=slots,
            context=context,
            window=window,
            pages=pages,
            device=self.device,
        )
        self._steps: graphs.Steps = graphs.Eager(model, self.pool)
        self._guessing: Guessing | None = None
        if drafter is not None:
            self._guessing = Guessing(windows.Eager(model, self.pool, drafter), most, guesses)
        self.cache: PrefixCache[Snapshot] | None = (
            PrefixCache(prefix_bytes, self.pool.drop) if prefix_bytes else None
        )
        self._keeping = Keeping(self.cache, self.pool)
        self._scheduler = Scheduler(
            self.pool.table,
            Limits(
                context,
                prefill_tokens,
                max_waiting,
                window,
                block=self.cache.block if self.cache is not None else 0,
            ),
            self._keeping.longest,
            self._keeping.resume,
            self._keeping.reclaim,
        )
        #: What was launched, and not seen yet.
        self._flight: Flight | None = None
        self._landed = 0.0
        self._deliver: dict[Request, Deliver] = {}
        self._counters = Counters()
        #: Guards the scheduler; never held while the model runs.
        self._turn = threading.Condition(threading.RLock())
        self._stopping = False
        #: Why the engine ended by itself; None while it has not.
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to run requests."""
        self._thread.start()

    def submit(self, request: Request, deliver: Deliver) -> None:
        """Queue a request; see submit_all."""
        self.submit_all({request: deliver})

    def submit_all(self, requests: Mapping[Request, Deliver]) -> None:
        """Queue requests, all or none. A request's `deliver` is called for every step that adds to
        it, last with a finish.

        Raises QueueFull, EngineStopped, or ValueError for a prompt that does not fit.
        """
        with self._turn:
            if self._stopping:
                raise EngineStopped(self.failure or "the engine is stopping")
            self._scheduler.submit(*requests)
            self._deliver.update(requests)
            self._turn.notify()

    @property
    def most_at_once(self) -> int:
        """Requests that an idle engine takes at a time."""
        return self.pool.table.slots + self._scheduler.limits.max_waiting

    def state_specs(self) -> list[StateSpec]:
        """What a sequence keeps, as declared before anything was allocated."""
        return state_specs(self.model, self.drafter)

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
                counters=copy.deepcopy(self._counters),
                prefix=self.cache.stats() if self.cache is not None else None,
                guesses=self._guessing.now if self._guessing is not None else 0,
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
        if graphs.possible(self.model):
            self._capture()

    def _capture(self) -> None:
        record, reader = graphs.Recorder(), windows.reader(self.drafter)
        self._steps = graphs.Captured(self.model, self.pool, record, reader)
        if self._guessing is None or self.drafter is None:
            return
        if windows.possible(self.model, self.drafter):
            numbers = self._guessing.numbers
            self._guessing.windows = windows.Captured(
                self.model, self.pool, self.drafter, numbers, record
            )

    @torch.inference_mode()
    def _main(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._pass(batch)
            self._land(self._flight)
        except BaseException as error:  # a panic of Rust's is no Exception
            log.exception("the engine ends")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            self._end()

    def _next(self) -> Batch | None:
        """The next work, waited for; None when the engine is to end. An empty batch: there is
        nothing to do but to take in what was launched."""
        with self._turn:
            while not self._stopping:
                for request in self._scheduler.cancelled():
                    self._finish(request, Output(finish=FinishReason.CANCELLED))
                if (batch := self._scheduler.next()) or self._flight is not None:
                    self.pool.sync()
                    return batch
                self.pool.check()
                self._turn.wait()
            return None

    def _pass(self, batch: Batch) -> None:
        """Run the batch. What the one before it chose is taken in meanwhile, or where the host has
        to know it, before."""
        k = self._guessing.choose(batch.decode) if self._guessing and batch.decode else 0
        before, self._flight = self._flight, None
        if batch and not k and self._steps.ahead and all(map(sample.is_free, batch.requests)):
            self._flight = self._tried(batch, lambda: self._launch(batch))
            self._land(before)
            return
        self._land(before)
        if batch := batch.running():
            outputs = self._tried(batch, lambda: self._run(batch, k))
            if outputs is not None:
                self._hand_out(batch, outputs)

    def _tried(self, batch: Batch, work: Callable[[], T]) -> T | None:
        """What `work` answers; None where it failed, which has ended the batch's requests."""
        try:
            return work()
        except IntegrityError:
            raise
        except Exception as error:
            log.exception("a step failed")
            self._fail(batch, f"the model failed: {type(error).__name__}")
            return None

    def _launch(self, batch: Batch) -> Flight:
        flight = Flight(batch, time.monotonic())
        if batch.prefill:
            read = self._prefill(batch.prefill)
            done = [span.request for span in batch.prefill if span.last]
            flight.add(self._steps, read, done)
        if batch.decode:
            flight.add(self._steps, self._step(batch.decode), batch.decode)
        return flight

    def _land(self, flight: Flight | None) -> None:
        """Take in what a flight chose; whoever has ended since it was launched is past it."""
        if flight is None:
            return
        chosen = self._tried(flight.batch, flight.land)
        if chosen is None:
            return
        outputs = {
            request: self._accept(request, sample.known(token))
            for request, token in chosen
            if request.finish is None
        }
        began, self._landed = max(flight.began, self._landed), time.monotonic()
        if self._guessing is not None and not flight.batch.prefill:
            self._guessing.took(len(flight.batch.decode), 0, self._landed - began)
        self._hand_out(flight.batch, outputs)

    def _run(self, batch: Batch, k: int) -> dict[Request, Output]:
        """The model over the batch, and what it adds to each request whose token was due."""
        outputs: dict[Request, Output] = {}
        if batch.prefill:
            read = self._prefill(batch.prefill)
            done = [span.request for span in batch.prefill if span.last]
            self._choose(done, read, outputs)
        if batch.decode and self._guessing is None:
            self._choose(batch.decode, self._step(batch.decode), outputs)
        elif batch.decode and self._guessing is not None:
            with self._guessing.measured(len(batch.decode), k):
                if k:
                    self._speculate(self._guessing, batch.decode, k, outputs)
                else:
                    self._choose(batch.decode, self._step(batch.decode), outputs)
        return outputs

    def _choose(
        self, requests: Sequence[Request], stepped: graphs.Stepped, outputs: dict[Request, Output]
    ) -> None:
        """The next token of each."""
        chosen = stepped.best
        best = None if chosen is None else [[token] for token in chosen]
        self._judge(requests, stepped.logits[:, None], [[]] * len(requests), outputs, best)

    def _prefill(self, spans: Sequence[Span]) -> graphs.Stepped:
        """The logits are of the prompts that are read to their end."""
        tokens, bounds = [], [0]
        for span in spans:
            tokens += span.request.tokens[span.start : span.stop]
            bounds.append(len(tokens))
        ends = [i for i, span in enumerate(spans) if span.last]
        slots = [span.request.slot or 0 for span in spans]
        read = self._steps.read(tokens, bounds, slots, ends)
        self._drafter_reads(read.tokens, read.hidden, read.slots, read.bounds)
        for span in spans:
            span.request.computed = span.stop
            with self._turn:
                self._keeping.keep(span.request)
        return read

    def _step(self, requests: Sequence[Request]) -> graphs.Stepped:
        """One token each: the last one, or the one that is chosen by then."""
        self._read_in(requests)
        tokens = [r.tokens[-1] if r.pending else graphs.CHOSEN for r in requests]
        step = self._steps.run(tokens, [request.slot or 0 for request in requests])
        if not self._steps.drafted:
            self._drafter_reads(step.tokens, step.hidden, step.slots, step.bounds)
        for request in requests:
            request.computed += 1
        return step

    def _read_in(self, requests: Sequence[Request]) -> None:
        """Count a pass. The last token of a prompt may be all that is left to read of it."""
        self._counters.passes += len(requests)
        last = sum(request.computed < len(request.prompt) for request in requests)
        self._counters.prompt_tokens += last

    def _speculate(
        self, guessing: Guessing, requests: Sequence[Request], k: int,
        outputs: dict[Request, Output],
    ) -> None:  # fmt: skip
        """One token each, and of `k` guesses behind it those that come true."""
        self._read_in(requests)
        seen = guessing.windows.run(requests, k, self.context)
        # One that wants no guesses goes along with the others' window.
        guesses = [
            row if r.speculate else [] for r, row in zip(requests, seen.guesses, strict=True)
        ]
        taken = self._judge(requests, seen.logits, guesses, outputs, seen.best)
        moved = seen.accepted or guessing.windows.settle(taken)
        for request, guessed, count, move in zip(requests, guesses, taken, moved, strict=True):
            over = outputs[request].finish is not None
            if move != count and not over:
                raise IntegrityError(f"{move} tokens were taken in where {count} came true")
            # A state behind the end of its answer is nobody's beginning.
            request.computed = request.computed + count if move == count else 0
            # Guesses behind the end of an answer were neither right nor wrong.
            guessing.learn(self._counters, guessed, count - 1, count - 1 if over else count)

    def _judge(
        self,
        requests: Sequence[Request],
        logits: Tensor | None,
        guesses: Sequence[Sequence[int]],
        outputs: dict[Request, Output],
        best: Sequence[Sequence[int]] | None = None,
    ) -> list[int]:
        """Choose tokens along each row of logits [B, K, V] for as long as the guesses come true.

        Answers how many places of each row count: the tokens at them are in the sequence now.
        Every place is chosen after the tokens before it were taken in, so that a grammar's mask
        and penalties are those of plain decoding. `best` ([B][K]): see sample.choose; without
        logits all there is.
        """
        taken, going = [0] * len(requests), list(range(len(requests)))
        for place in itertools.count():
            known = [best[i][place] for i in going] if best is not None else None
            if logits is None:
                choices = [sample.known(token) for token in known or ()]
            else:
                rows = logits[:, place] if len(going) == len(requests) else logits[going, place]
                choices = sample.choose(rows, [requests[i] for i in going], known)
            still = []
            for i, choice in zip(going, choices, strict=True):
                request, taken[i] = requests[i], place + 1
                output = outputs[request] = joined(
                    outputs.get(request), self._accept(request, choice)
                )
                if output.finish is None and output.tokens[-1:] == tuple(
                    guesses[i][place : place + 1]
                ):
                    still.append(i)
            if not still:
                break
            going = still
        return taken

    def _drafter_reads(self, tokens: Tensor, hidden: Tensor, slots: Tensor, cu: Tensor) -> None:
        if self.drafter is not None:
            self.drafter.read(Read(tokens, hidden, slots, cu), self.pool)

    def _hand_out(self, batch: Batch, outputs: Mapping[Request, Output]) -> None:
        with self._turn:
            self._counters.steps += 1
            self._counters.prompt_tokens += sum(s.stop - s.start for s in batch.prefill)
            for request, output in outputs.items():
                if request.cancelled:  # it left while the model ran
                    continue
                if output.finish is None:
                    self._deliver[request](output)
                else:
                    if output.finish is not FinishReason.ERROR:
                        self._keeping.keep(request)
                    self._finish(request, output)

    def _accept(self, request: Request, choice: TokenLogprob | Exception) -> Output:
        """Take a token in: what it adds to the text, and whether it is the last."""
        try:
            if isinstance(choice, Exception):
                raise choice
            return self._taken_in(request, choice)
        except Exception as error:
            # Of this request alone: a grammar that cannot go on, scores that are no numbers.
            log.warning("request %d failed: %s", request.number, error, exc_info=error)
            return Output(finish=FinishReason.ERROR, error=f"the answer broke off: {error}")

    def _taken_in(self, request: Request, choice: TokenLogprob) -> Output:
        token, params = choice.token, request.sampling
        if token in params.stop_ids:
            request.ended_by = token
            return Output(text=request.text.flush(), finish=FinishReason.STOP)
        self._counters.generated_tokens += 1
        request.tokens.append(token)
        text = request.text.push(token)
        finish = None
        if request.constraint is not None:
            request.constraint.advance(token)
        if request.text.stopped or (request.constraint and request.constraint.finished):
            finish = FinishReason.STOP
        elif self._scheduler.full(request):
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
            for request in batch.running().requests:
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
        return sent(values, self.device)
