"""Questions over one open document that are answered together: a step makes a token of each in one pass of the model.

A question is read over the pages as one that is asked alone, and then decodes among the others; each has its own
choices of pages, made after as many of its own tokens. So answers are those of single questions, token for token in
fp32. As many run as memory has room for their rows; others begin as some end.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from threading import Event

import torch
from torch import Tensor

from ragkit.errors import GenerationError
from ragkit.generation.engine import Engine
from ragkit.generation.page_decode import PageSteps
from ragkit.generation.page_request import PageRequest, PageResult
from ragkit.generation.paged_prefill import PagedPrefill
from ragkit.generation.paged_question import PagedQuestion
from ragkit.generation.placement import free_memory
from ragkit.kvcache.kv_pages import KVPages

_SHARE_OF_FREE = 0.5  # of the memory that is free at first, for rows of questions: passes and others need some as well

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PageBatchStats:
    """What a batch counted.

    Attributes:
        steps: passes of the model that made a token of each running question.
        tokens: that they made.
        running_peak: most questions that ran at a time.
        given_way: how often a question let its rows go because memory ran out, and began again later.
    """

    steps: int = 0
    tokens: int = 0
    running_peak: int = 0
    given_way: int = 0


@dataclass(slots=True, eq=False)
class _Running:
    request: PageRequest
    question: PagedQuestion
    pieces: list[str] = field(default_factory=list)


class PageBatch:
    """Answers questions over one document. Between its calls it holds rows of those that run, and no lock.

    Args:
        engine: the model.
        prefill: how the document's pages are attended to.
        pages: the document, read to its end; open as long as the batch goes on.
        requests: what is asked, pulled as there is room.
        max_running: most questions at a time.
        stop: when set, what runs is let go.

    Attributes:
        pages: the document.
        stats: what was done.
    """

    def __init__(
        self,
        engine: Engine,
        prefill: PagedPrefill,
        pages: KVPages,
        requests: Iterable[PageRequest],
        *,
        max_running: int,
        stop: Event | None = None,
    ) -> None:
        self.pages = pages
        self.stats = PageBatchStats()
        self._engine = engine
        self._prefill = prefill
        self._coming = iter(requests)
        self._waiting: deque[PageRequest] = deque()  # those that were pulled, and found no room
        self._running: list[_Running] = []
        self._most = max_running
        self._nbytes = int(_SHARE_OF_FREE * _free_bytes(pages.device))  # that rows may take
        self._stop = stop or Event()
        self._steps: PageSteps | None = None

    def run(self) -> Iterator[PageResult]:
        """Yield one result a question, as they end; fewer where the batch was stopped.

        Raises:
            OSError: pages cannot be read from the disk.
        """
        while results := self.advance():
            yield from results

    @torch.inference_mode()
    def advance(self) -> list[PageResult]:
        """Go on until some questions end, and return how; nothing where none is left, or it was stopped.

        The document's lock is held for each pass of the model, so that other threads have their turns between them.

        Raises:
            OSError: pages cannot be read from the disk.
        """
        while not self._stop.is_set():
            if ended := self._join():
                return ended
            if not self._running:
                break
            if ended := self._step():
                return ended
        return []

    def let_go(self) -> list[PageRequest]:
        """Let all rows go, and return the requests that were pulled and have no result; no more is done here."""
        pulled = [*(one.request for one in self._running), *self._waiting]
        self._change([])
        self._waiting.clear()
        return pulled

    def _join(self) -> list[PageResult]:
        """Begin questions as long as there is room; return those that end at once."""
        ended: list[PageResult] = []
        while len(self._running) < self._most and not self._stop.is_set():
            request = self._waiting.popleft() if self._waiting else next(self._coming, None)
            if request is None:
                break
            try:
                question = PagedQuestion(self._engine, self._prefill, self.pages, request.token_ids, request.sampling)
                if self._running and not self._has_room(question):
                    self._waiting.appendleft(request)
                    break
                logits = question.read()
            except torch.OutOfMemoryError as error:
                if self._running:
                    self._wait_again(request, len(self._running))
                    break
                ended.append(PageResult(request.name, error=_no_memory(error)))
                continue
            except (OSError, MemoryError):
                raise
            except Exception as error:
                ended.append(PageResult(request.name, error=error))
                continue
            one = _Running(request, question)
            if result := self._taken(one, logits, None):
                ended.append(result)
            else:
                self._change([*self._running, one])
        self.stats.running_peak = max(self.stats.running_peak, len(self._running))
        return ended

    def _has_room(self, question: PagedQuestion) -> bool:
        return sum(one.question.nbytes for one in self._running) + question.nbytes <= self._nbytes

    def _step(self) -> list[PageResult]:
        """Make a token of each running question; return what ended."""
        running = self._running
        try:
            logits, failed = self._logits()
        except torch.OutOfMemoryError as error:
            return self._give_way(error)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # of one that runs alone, or of all
            self._change([])
            return [PageResult(one.request.name, error=error) for one in running]
        self.stats.steps += 1
        self.stats.tokens += len(running)
        likeliest = logits.argmax(dim=-1).tolist()  # the host waits once for all of them
        ended: dict[int, PageResult] = {}
        for place, one in enumerate(running):
            if place in failed:
                ended[place] = PageResult(one.request.name, error=failed[place])
            elif result := self._taken(one, logits[place], likeliest[place]):
                ended[place] = result
        if ended:
            self._change([one for place, one in enumerate(running) if place not in ended])
        return list(ended.values())

    def _logits(self) -> tuple[Tensor, Mapping[int, Exception]]:
        """Return (running, vocab_size) logits after the last token of each, and why some have none."""
        questions = [one.question for one in self._running]
        if self._steps is None:
            attends, rows = [one.attend for one in questions], [one.next_row for one in questions]
            self._steps = PageSteps.of(self._engine.decoder, attends, rows)
        logits = self._steps.step([one.answer[-1] for one in questions], [one.chooses for one in questions])
        return logits, dict(self._steps.failed)

    def _taken(self, one: _Running, logits: Tensor, likeliest: int | None) -> PageResult | None:
        """Give a question the logits after its last token; return its result if it ended."""
        question, name = one.question, one.request.name
        try:
            token = question.take(logits, likeliest)
            if token is not None:
                one.pieces.append(token.piece)
            if question.reason is None:
                return None
            finished = question.finished()
        except Exception as error:
            return PageResult(name, error=error)
        return PageResult(name, "".join([*one.pieces, finished.piece]), question, finished)

    def _give_way(self, error: torch.OutOfMemoryError) -> list[PageResult]:
        """Let the question that began last begin again later; return the error of one that runs alone."""
        *others, last = self._running
        self._change(others)
        if not others:
            return [PageResult(last.request.name, error=_no_memory(error))]
        self.stats.given_way += 1
        self._wait_again(last.request, len(others))
        return []

    def _wait_again(self, request: PageRequest, most: int) -> None:
        """Have a question wait that found no memory; no more than `most` run from now on."""
        _log.warning("memory ran out with %d questions over a document's pages at once: %d from now on", most + 1, most)
        self._waiting.appendleft(request)
        self._most = most

    def _change(self, running: list[_Running]) -> None:
        """Note who runs from now on: steps are made for those who do."""
        self._running = running
        if self._steps is not None:
            self._steps.close()
            self._steps = None


def _free_bytes(device: torch.device) -> int:
    """Return the bytes that rows can have on a device, those included that torch keeps for its tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return free_memory(device) + kept


def _no_memory(error: Exception) -> GenerationError:
    return GenerationError(f"the question found no memory for the rows of its pages: {error}")
