"""ragkit's embedder as a LlamaIndex embedding model: what a store of ragkit's is searched and filled with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

from ragkit.config import Device, EmbeddingConfig, PipelineConfig
from ragkit.pipeline import Pipeline
from ragkit.retrieval.base import Embedder

_DEFAULT_MODEL = EmbeddingConfig().model


class RagkitEmbedding(BaseEmbedding):  # type: ignore[misc]
    """Embeds with one of ragkit's models. Texts longer than the model's window are embedded in windows and pooled.

    Args:
        model_name: a bundled name, a folder or a Hugging Face id.
        device: auto, cpu or cuda.
        offline: fetch nothing.
    """

    model_name: str = Field(default=_DEFAULT_MODEL, description="Name, folder or hub id of the embedder.")
    device: str = Field(default=str(Device.AUTO), description="Where the model runs: auto, cpu or cuda.")
    offline: bool = Field(default=False, description="Fetch nothing.")

    _pipeline: Pipeline | None = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises the model by."""
        return "RagkitEmbedding"

    @classmethod
    def from_pipeline(cls, pipeline: Pipeline, **fields: Any) -> RagkitEmbedding:
        """Return the embedder of a pipeline, loaded once for both; `fields` are those of LlamaIndex's base class."""
        model = cls(model_name=pipeline.config.embedding.model, **fields)
        model._pipeline = pipeline
        return model

    @property
    def embedder(self) -> Embedder:
        """The embedder itself; loaded on first use."""
        if self._pipeline is None:
            config = PipelineConfig(
                device=Device(self.device), offline=self.offline, embedding=EmbeddingConfig(model=self.model_name)
            )
            self._pipeline = Pipeline(Path(), config)  # for its models alone: no store is opened
        return self._pipeline.embedder

    def _get_query_embedding(self, query: str) -> list[float]:
        return list(map(float, self.embedder.encode_queries([query])[0]))

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return [list(map(float, row)) for row in self.embedder.encode(texts)]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)
