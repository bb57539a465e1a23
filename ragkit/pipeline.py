"""The SDK's front door: a `Pipeline` over one store folder. It wires the parts; each step lives in its own module.

ingest   jobs.plan -> jobs.ingest (readers -> chunking -> embedder -> store)
query    retrieval.retriever -> answers.confidence -> generation -> answers.citations   (ragkit.request)
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Unpack

from ragkit.async_questions import AsyncQuestions
from ragkit.config import PipelineConfig, SearchMode
from ragkit.errors import StoreError, StoreMissingError
from ragkit.jobs.many import ManyQuestions
from ragkit.parts import Parts
from ragkit.progress import Progress, Silent
from ragkit.reports import ExportReport, IngestReport, KVStatus, SearchResult
from ragkit.store import Store
from ragkit.store.base import GcReport, SourceRecord, StoreCounts, StoreMeta, VerifyReport
from ragkit.types import Answer, Document, MetadataValue, TextTokenizer

if TYPE_CHECKING:
    from ragkit.answers.options import QuestionOptions
    from ragkit.generation.engine import Engine
    from ragkit.readers.source import Findable
    from ragkit.request import AnswerStream
    from ragkit.retrieval.base import Embedder
    from ragkit.retrieval.retriever import Retriever

logger = logging.getLogger(__name__)


class Pipeline(AsyncQuestions, ManyQuestions):
    """Ingests sources into a store and answers questions about them.

    Models load on first use and stay. Reads may come from any thread; one ingest runs at a time per store. Use it as
    a context manager, or call `close`.

        with Pipeline.open("store") as rag:
            rag.ingest(["docs/"])
            print(rag.query("How do I ...?").text)
    """

    def __init__(
        self,
        folder: Path,
        config: PipelineConfig,
        *,
        embedder: Embedder | None = None,
        tokenizer: TextTokenizer | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.config = config
        self.parts = Parts(folder, config, embedder=embedder, tokenizer=tokenizer, engine=engine)

    @classmethod
    def open(
        cls,
        store: str | Path = ".ragkit",
        config: PipelineConfig | None = None,
        *,
        create: bool = True,
        embedder: Embedder | None = None,
        tokenizer: TextTokenizer | None = None,
        engine: Engine | None = None,
    ) -> Pipeline:
        """Return a pipeline over the store folder; a missing one is created by the first ingest if `create`.

        Args:
            store: the store folder.
            config: settings; the defaults where left out.
            create: False raises where there is no store yet.
            embedder, tokenizer, engine: used instead of the configured models.

        Raises:
            StoreMissingError: no store is there and `create` is False.
            StoreError: the store cannot be opened.
        """
        pipeline = cls(Path(store), config or PipelineConfig(), embedder=embedder, tokenizer=tokenizer, engine=engine)
        if not create and not pipeline.parts.has_store():
            _ = pipeline.store  # raises, and says what to do
        return pipeline

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store and let the models go."""
        self.parts.close()

    # ------------------------------------------------------------------------------------------------ ingest

    def ingest(
        self,
        sources: Findable | Sequence[Findable],
        *,
        prune: bool = False,
        reembed: bool = False,
        retry_failed: bool = False,
        dry_run: bool = False,
        kv: bool | None = None,
        pages: bool = False,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> IngestReport:
        """Bring the store in step with `sources` and return what was done.

        Unchanged content is skipped, renamed files are linked again, edited ones replaced in one commit. A source
        that fails is reported and never stops the others.

        Args:
            sources: one or several of files, folders (recursive), URLs (`s3://...`, `https://...`), databases with a
                query (`postgresql://...?query=SELECT ...`), iterables of `Document`, or `-` for standard input.
            prune: also remove what the store knows below the given folders and is no longer there.
            reembed: replace every vector when the configured embedder is not the store's.
            retry_failed: read again what failed before, unchanged.
            dry_run: only say what would be done.
            kv: also compute the KV of every chunk that has none stored, so that no question has to; the configuration's
                `ingest.kv` where left out.
            pages: also read every document into pages that is longer than the generator's window.
            progress: hears about the advance.
            stop: when set, what is not committed yet is left to the next run and the report says `interrupted`.

        Raises:
            UsageError: a given source does not exist.
            EmbedderMismatchError: the store was built with another embedder and `reembed` is False.
            StoreLockedError: another process writes and did not finish in time.
            StoreError: the store cannot be written.
        """
        from ragkit.jobs.run import run_ingest

        return run_ingest(
            self.parts,
            # A text is a sequence as well: of letters, none of which is a file.
            [sources] if isinstance(sources, str | os.PathLike | Document) else list(sources),
            prune=prune,
            reembed=reembed,
            retry_failed=retry_failed,
            dry_run=dry_run,
            kv=self.config.ingest.kv if kv is None else kv,
            pages=pages,
            progress=progress or Silent(),
            stop=stop,
        )

    # ------------------------------------------------------------------------------------------------ questions

    def search(
        self,
        question: str,
        *,
        k: int | None = None,
        filter: Mapping[str, MetadataValue] | None = None,
        mode: SearchMode | str | None = None,
    ) -> SearchResult:
        """Return the chunks that fit `question` best.

        Args:
            question: natural language or keywords.
            k: how many; the configuration's number where left out.
            filter: metadata that a chunk's document must have; `uri` takes a glob.
            mode: hybrid, dense or bm25.

        Raises:
            UsageError: an empty question, or an impossible `k` or mode.
            StoreMissingError: nothing was ingested yet.
        """
        from ragkit.request import search

        return search(self.parts, question, k=k, filter=filter, mode=mode)

    def query(self, question: str, *, progress: Progress | None = None, **options: Unpack[QuestionOptions]) -> Answer:
        """Return the answer to `question` with its citations; arguments as for `stream`."""
        stream = self.stream(question, progress=progress, **options)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self, question: str, *, progress: Progress | None = None, **options: Unpack[QuestionOptions]
    ) -> AnswerStream:
        """Return an iterator over the pieces of the answer; afterwards `.answer` holds all of it.

        Args:
            question: what is asked.
            progress: hears of a document that is read before it is answered from, which may take long.
            options: k, strategy, ratio, filter, document, system_prompt, max_new_tokens, temperature, top_p, seed,
                draft, draft_mode: see `QuestionOptions`.

        Raises:
            UsageError: an empty question or an impossible option.
            StoreMissingError: nothing was ingested yet.
        """
        from ragkit.answers.options import QuestionChanges, query_options, require_options
        from ragkit.request import stream

        require_options("stream", options)
        return stream(self.parts, question, query_options(self.parts, QuestionChanges.of(options), progress))

    # ------------------------------------------------------------------------------------------------ the store

    def documents(self) -> list[SourceRecord]:
        """Return every known source with its state, in order of URI."""
        return self.store.sources()

    def remove(self, uris: Sequence[str], *, erase: bool = False) -> tuple[str, ...]:
        """Forget sources and return their URIs; `erase` also overwrites text, vectors and KV on disk.

        Raises:
            UsageError: a URI is unknown; nothing was removed.
        """
        from ragkit.readers.file_systems import stored_name

        known = {record.uri for record in self.store.sources()}
        names = [uri if uri in known else stored_name(uri) for uri in uris]
        try:
            with self.store.writer(lock_timeout_s=self.config.ingest.lock_timeout_s) as writer:
                return writer.remove(names, erase=erase)
        finally:  # an erasure that waits for a reader has removed them already
            self.parts.forget_removed()

    def status(self) -> tuple[StoreMeta, StoreCounts]:
        """Return what the store was built with, and how much it holds."""
        with self.store.snapshot():
            return self.store.meta, self.store.counts()

    def export(self, target: str | Path, *, kind: str = "chunks", vectors: bool = False) -> ExportReport:
        """Write the `chunks` or `documents` of the store as a Parquet file, at a path or an fsspec URL.

        Raises:
            UsageError: there is no such kind, or the place cannot be written to.
            JobError: the file could not be brought to its place; an older one there is as it was.
        """
        from ragkit.export import export_store

        return export_store(self.store, target, kind, vectors=vectors)

    def kv_status(self) -> KVStatus:
        """Return how much chunk KV is stored and used, and how much it would be for all chunks. No model is loaded."""
        from ragkit.jobs.kv_status import read_kv_status

        return read_kv_status(self.store, self.config, self._loaded_engine())

    def gc(self, *, unused_kv: bool = False) -> GcReport:
        """Remove what nothing references, and rewrite segments that are mostly dead.

        `unused_kv` also removes the chunk KV that the present settings do not use (`KVStatus.other_bytes`).

        Raises:
            UsageError: `unused_kv` is asked for, and the generator is not at hand.
        """
        keys: list[str] = []
        if unused_kv:
            from ragkit.jobs.kv_status import unused_kv as found

            keys = found(self.store, self.config, self._loaded_engine())
        return self.store.gc(lock_timeout_s=self.config.ingest.lock_timeout_s, forget_kv=keys)

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Check every stored byte. `repair` marks the sources of damaged parts, so that the next ingest reads them.

        Where chunk KV is stored, the generator's weights are hashed anew: KV is found by their remembered hash.
        """
        from ragkit.store.verify import verify_store

        try:
            store = self.store
        except StoreMissingError:
            raise
        except StoreError as error:  # a catalogue too damaged to open: say all that is wrong with it
            logger.warning("%s", error)
            return verify_store(self.folder)
        with contextlib.suppress(StoreError):  # damage is the report's to tell
            if store.kv_totals().entries:
                self._check_weights()
        return store.verify(repair=repair, lock_timeout_s=self.config.ingest.lock_timeout_s)

    # ------------------------------------------------------------------------------------------------ parts

    @property
    def folder(self) -> Path:
        """The store folder."""
        return self.parts.folder

    @property
    def store(self) -> Store:
        """The open store; raises `StoreMissingError` where nothing was ingested yet."""
        return self.parts.store

    @property
    def embedder(self) -> Embedder:
        """The embedder."""
        return self.parts.embedder

    @property
    def tokenizer(self) -> TextTokenizer:
        """The generator's tokenizer."""
        return self.parts.tokenizer

    @property
    def engine(self) -> Engine:
        """The generator."""
        return self.parts.engine

    @property
    def retriever(self) -> Retriever:
        """The retriever over the store; raises `EmbedderMismatchError` where another embedder built it."""
        return self.parts.retriever

    def _loaded_engine(self) -> Engine | None:
        return self.parts.engine if self.parts.is_loaded("engine") else None

    def _check_weights(self) -> None:
        """Warn where the weights have other bytes than their size, time and inode said, and remember what they are."""
        from ragkit.models import local_folder, weights_fingerprint

        folder = local_folder(self.config.generation.model)
        if folder is not None and weights_fingerprint(folder) != weights_fingerprint(folder, rehash=True):
            logger.warning(
                "the weights in %s were changed in place; chunk KV of the ones before is not used any more", folder
            )
