"""What an answer from a document's pages consists of around generation, the same for one question and for a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event
from typing import TYPE_CHECKING

from ragkit.answers.base import RankedChunk
from ragkit.answers.options import QueryOptions
from ragkit.answers.steps import answer_of, page_lookup
from ragkit.config import Strategy
from ragkit.drafting import NO_PAGES
from ragkit.errors import GenerationError
from ragkit.types import Answer, AttendedSpan

if TYPE_CHECKING:
    from ragkit.documents import WholeDocument
    from ragkit.generation.paging import PagedDocument
    from ragkit.generation.steps import Finished
    from ragkit.parts import Parts


@contextmanager
def open_document(
    parts: Parts, whole: WholeDocument, options: QueryOptions, stop: Event | None = None
) -> Iterator[tuple[PagedDocument, bool]]:
    """Give a document that is open and read to its end, and whether it had to be read; it stays open in the block.

    Args:
        parts: store and models.
        whole: the document.
        options: the system prompt behind which it is read, and who hears of reading.
        stop: ends reading.

    Raises:
        CacheCapacityError: it is larger than the budgets.
        GenerationError: reading was stopped, or what is attended to does not fit the model's window.
        KVCacheError: the disk could not be written.
    """
    paging = parts.paging  # first: it imports torch, which counts as loading
    from ragkit.generation.paging import PagedText, price_line

    document = whole.document
    text = PagedText(document.doc_id, document.text, whole.chunks[0].chunk_id)
    with paging.document(text, options.generation.system_prompt) as opened:
        is_missing = not opened.pages.is_complete
        if is_missing:
            options.progress.message(price_line(whole.uri, paging.price(opened)))
            try:
                is_whole = paging.read(opened, options.progress, stop)
            finally:
                options.progress.close()
            if not is_whole:
                raise GenerationError(f"reading {whole.uri} was stopped: what was read is kept, ask again")
        yield opened, is_missing


def completed_from_pages(
    parts: Parts,
    question: str,
    whole: WholeDocument,
    options: QueryOptions,
    text: str,
    finished: Finished,
    attended: Sequence[AttendedSpan],
    *,
    timings_ms: Callable[[], Mapping[str, float]],
) -> Answer:
    """Return the answer made of the generated `text`, with its citations; `timings_ms` is asked when they are there.

    Args:
        parts: store and models.
        question: what was asked.
        whole: the document.
        options: the question's configuration.
        text: all pieces joined.
        finished: what generation yielded last.
        attended: stretches of the document that were found, those chosen most often first.
        timings_ms: returns the answer's timings.
    """
    from ragkit.answers.citations import cite
    from ragkit.documents import chunks_attended

    words = text.strip()
    hits = tuple(
        RankedChunk(chunk, whole.uri, score, None, None, rank)
        for rank, (chunk, score) in enumerate(chunks_attended(whole, attended, options.retrieval.k), start=1)
    )
    citations = cite(question, words, hits, parts.embedder, options.answers, page_lookup(parts, hits))
    undrafted = () if options.draft.drafter in ("none", "auto") else (NO_PAGES,)
    return answer_of(
        options,
        timings_ms(),
        text=words,
        citations=citations,
        strategy=Strategy.PAGES,
        tokens=finished.usage,
        kv=finished.kv,
        attended=tuple(attended),
        warnings=(*options.ratio_warnings(Strategy.PAGES), *undrafted),
    )
