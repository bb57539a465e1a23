"""What a pipeline works with: the store and the models, each loaded on first use and kept.

How long loading took is counted here, so that the timings of a question can leave it out.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ragkit.config import Device, PipelineConfig
from ragkit.errors import EmbedderMismatchError, StoreMissingError
from ragkit.store import Store
from ragkit.types import Prompt, TextTokenizer

if TYPE_CHECKING:
    from ragkit.documents import FoundDocuments
    from ragkit.draft_config import DraftConfig
    from ragkit.generation.blending import Blending
    from ragkit.generation.decoder import Decoder
    from ragkit.generation.drafter import Drafter
    from ragkit.generation.engine import Engine
    from ragkit.generation.paging import Paging
    from ragkit.retrieval.base import ChunkEmbedder, Embedder
    from ragkit.retrieval.retriever import Retriever

_Part = TypeVar("_Part")


class _LoadTime(threading.local):
    """Seconds that each thread spent on loading: a question leaves out its own, not what others load meanwhile."""

    seconds: float = 0.0


class Parts:
    """The parts of one pipeline. Safe to use from threads: each part is loaded once.

    Args:
        folder: the store folder.
        config: which models, and how.
        embedder, tokenizer, engine: used instead of the configured ones.
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
        self.folder = folder
        self.config = config
        given = {"embedder": embedder, "tokenizer": tokenizer, "engine": engine}
        self._loaded: dict[str, object] = {name: part for name, part in given.items() if part is not None}
        self.given = tuple(self._loaded)  # parts that the configuration does not name
        self._loading = threading.RLock()
        self._load_time = _LoadTime()

    def close(self) -> None:
        """Write what is unsaved, close the store and let the models go."""
        store, retriever, blending = (self._loaded.get(name) for name in ("store", "retriever", "blending"))
        paging = self._loaded.get("paging")
        self._loaded.clear()
        if paging is not None:
            paging.close()  # type: ignore[attr-defined]
        if blending is not None:
            blending.close()  # type: ignore[attr-defined]
        if retriever is not None:
            retriever.close()  # type: ignore[attr-defined]
        if isinstance(store, Store):
            store.close()

    @property
    def store(self) -> Store:
        """The open store.

        Raises:
            StoreMissingError: nothing was ingested yet.
        """
        if "store" not in self._loaded and not self.has_store():
            raise StoreMissingError(
                f"there is no store in {self.folder}; `ragkit ingest SOURCE --store {self.folder}` makes one"
            )
        return self._part("store", lambda: Store.open(self.folder))

    def create_store(self) -> Store:
        """Return the store, made now where there is none."""
        return self._part("store", lambda: Store.open_or_create(self.folder))

    @property
    def documents(self) -> FoundDocuments:
        """The documents of the store, whole.

        Raises:
            StoreMissingError: nothing was ingested yet.
        """
        from ragkit.documents import FoundDocuments

        store = self.store
        return self._part("documents", lambda: FoundDocuments(store))

    def has_store(self) -> bool:
        """Return whether anything was ever ingested here."""
        return Store.exists(self.folder)

    @property
    def embedder(self) -> Embedder:
        """The embedder of the configuration."""

        def load() -> Embedder:
            from ragkit.retrieval.embedders import load_embedder

            return load_embedder(self.config.embedding, device=self.config.device, offline=self.config.offline)

        return self._part("embedder", load, is_model=True)

    @property
    def chunk_embedder(self) -> ChunkEmbedder:
        """What embeds chunks with the embedder, as the configuration says.

        Raises:
            UsageError: the embedder cannot embed them so.
        """

        def load() -> ChunkEmbedder:
            from ragkit.retrieval.chunk_vectors import chunk_embedder

            return chunk_embedder(self.embedder, self.config.embedding)

        return self._part("chunk_embedder", load, is_model=True)

    @property
    def tokenizer(self) -> TextTokenizer:
        """The generator's tokenizer."""

        def load() -> TextTokenizer:
            from ragkit.models import resolve
            from ragkit.models.tokenizer import ModelTokenizer

            return ModelTokenizer(resolve(self.config.generation.model, offline=self.config.offline))

        return self._part("tokenizer", load, is_model=True)

    @property
    def engine(self) -> Engine:
        """The generator."""

        def load() -> Engine:
            from ragkit.generation.engine import Engine

            generation = self.config.generation
            return Engine.load(
                generation.model,
                device=self.config.device,
                dtype=generation.dtype,
                offline=self.config.offline,
                kv_tokens=self.config.batch.kv_tokens,
            )

        return self._part("engine", load, is_model=True)

    @property
    def blending(self) -> Blending:
        """Blended prefill with the engine over the store; over nothing but memory where there is no store."""

        def load() -> Blending:
            engine = self.engine
            from ragkit.generation.blending import Blending

            store = self.store if self.has_store() else None
            return Blending(engine, self.config.kv, self.config.blend, store)

        return self._part("blending", load, is_model=True)

    @property
    def paging(self) -> Paging:
        """Answers from documents in pages, with the engine over the store."""

        def load() -> Paging:
            engine = self.engine
            from ragkit.generation.paging import Paging

            store = self.store if self.has_store() else None
            return Paging(engine, self.config.pages, self.config.kv, store)

        return self._part("paging", load, is_model=True)

    def draft_engine(self, name: str) -> Engine:
        """Return the model that drafts under this name."""

        def load() -> Engine:
            from ragkit.generation.engine import Engine

            config = self.config
            return Engine.load(name, device=config.device, dtype=config.generation.dtype, offline=config.offline)

        return self._part(f"draft engine {name}", load, is_model=True)

    def drafter(self, config: DraftConfig, *, blended: bool, prompt: Prompt) -> Drafter:
        """Return the drafter that `config` names, made for the first question that it drafts for."""
        from ragkit.drafting import make_drafter

        key = _drafter_key(config, blended=blended)
        return self._part(key, lambda: make_drafter(self, config, blended=blended, prompt=prompt), is_model=True)

    def made_drafter(self, config: DraftConfig, *, blended: bool) -> Drafter | None:
        """Return the drafter that `config` names where a question was drafted by it before."""
        made: Drafter | None = self._loaded.get(_drafter_key(config, blended=blended))  # type: ignore[assignment]
        return made

    @property
    def int4_decoder(self) -> Decoder:
        """The generator's copy with weights of 4 bits, which drafts for it."""

        def load() -> Decoder:
            from ragkit.generation.int4_projection import int4_copy

            return int4_copy(self.engine.decoder, self.engine.folder)

        return self._part("int4 decoder", load, is_model=True)

    def forget_removed(self, heirs: Mapping[str, str] | None = None) -> None:
        """Drop what is kept in memory of chunks that have left the store, as `Blending.forget_removed` says."""
        if self.is_loaded("blending"):
            self.blending.forget_removed(heirs)
        if self.is_loaded("paging"):
            self.paging.forget_removed()
        if self.is_loaded("documents"):
            self.documents.forget_removed()

    def is_loaded(self, name: str) -> bool:
        """Return whether a part is there already."""
        return name in self._loaded

    @property
    def retriever(self) -> Retriever:
        """The retriever over the store, which follows its generation.

        Raises:
            EmbedderMismatchError: the store was built with another embedder.
        """

        def load() -> Retriever:
            from ragkit.retrieval.retriever import Retriever

            self.check_question_embedder()
            # Only on request: exact search over what fits a CPU takes milliseconds, a copy on the GPU seconds.
            device = "cuda" if self.config.device is Device.CUDA else "cpu"
            return Retriever(self.store, self.embedder, self.config.retrieval, device)

        return self._part("retriever", load, is_model=True)

    def check_embedder(self) -> None:
        """Raise `EmbedderMismatchError` where the store's vectors are not made as the configuration says."""
        self._check_embedder(self.store.meta.embedder_id, self.chunk_embedder.embedder_id)

    def check_question_embedder(self) -> None:
        """Raise `EmbedderMismatchError` where questions cannot be compared with the store's vectors.

        How chunks are embedded does not count: questions are embedded the same way for all.
        """
        from ragkit.retrieval.chunk_vectors import question_embedder_id

        self._check_embedder(question_embedder_id(self.store.meta.embedder_id), self.embedder.embedder_id)

    def _check_embedder(self, stored: str, configured: str) -> None:
        if stored and stored != configured:
            raise EmbedderMismatchError(
                f"{self.folder} was built with the embedder {stored} ({self.store.meta.dim} dimensions), but "
                f"{configured} ({self.embedder.dim}) is configured; set embedding.model and, to ingest, "
                "embedding.late_chunking and its window as they were, or run `ragkit ingest --reembed` to replace its "
                "vectors"
            )

    def load_seconds(self) -> float:
        """Return how long this thread has loaded models, or waited for one that another loaded, imports included."""
        return self._load_time.seconds

    def _part(self, name: str, load: Callable[[], _Part], *, is_model: bool = False) -> _Part:
        part = self._loaded.get(name)
        if part is None:
            started, before = time.perf_counter(), self._load_time.seconds
            with self._loading:
                part = self._loaded.get(name)
                if part is None:
                    part = self._loaded[name] = load()
            if is_model:  # what was loaded on the way is in this time already
                self._load_time.seconds = before + time.perf_counter() - started
        return part  # type: ignore[return-value]


def _drafter_key(config: DraftConfig, *, blended: bool) -> str:
    from ragkit.drafting import options_key

    return "drafter " + " ".join(map(str, options_key(config, blended=blended)))
