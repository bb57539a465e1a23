"""ragkit's chunkers as a LlamaIndex node parser whose nodes keep the exact spans of their chunks.

LlamaIndex's base class looks every node's text up in its document again and takes the first place at or behind the
start of the node before, which is another one where text repeats. Here the spans are the chunker's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.node_parser import NodeParser
from llama_index.core.node_parser.node_utils import build_nodes_from_splits
from llama_index.core.schema import BaseNode, MetadataMode

from ragkit.chunking.base import Chunker
from ragkit.chunking.metadata import with_metadata
from ragkit.chunking.registry import create_chunker
from ragkit.config import ChunkingConfig, Device, EmbeddingConfig, GenerationConfig, PipelineConfig
from ragkit.errors import UsageError
from ragkit.integrations.llama_index_nodes import CHUNK_ID_KEY, TOKEN_COUNT_KEY
from ragkit.types import Chunk, Document

_DEFAULTS = PipelineConfig()
_PLACE_KEYS = ("file_path", "url", "source", "file_name")


class RagkitNodeParser(NodeParser):  # type: ignore[misc]
    """Cuts LlamaIndex documents with one of ragkit's chunkers.

    `node.text == document.text[node.start_char_idx:node.end_char_idx]` for every node, whatever repeats. Nodes carry
    `heading_path` and `table_header` where they apply, and the chunk's id and token count.

    Args:
        chunker: the name that `ragkit chunk --chunker` takes.
        max_tokens: the hard cap, in the generator's tokens.
        overlap_tokens: repeated from the chunk before.
        generator: whose tokens are counted, and what the chunkers run that ask a language model.
        embedder: what the chunkers run that embed sentences.
        device: where models run.
        offline: fetch nothing.

    Raises:
        ConfigError: a setting is impossible; raised when the parser is made.
    """

    chunker: str = Field(default=_DEFAULTS.chunking.chunker, description="Name of the chunker.")
    max_tokens: int = Field(default=_DEFAULTS.chunking.max_tokens, description="Hard cap in the generator's tokens.")
    overlap_tokens: int = Field(default=0, description="Tokens repeated from the chunk before.")
    generator: str = Field(default=_DEFAULTS.generation.model, description="Model whose tokens are counted.")
    embedder: str = Field(default=_DEFAULTS.embedding.model, description="Model that embeds sentences.")
    device: str = Field(default=str(Device.AUTO), description="Where models run: auto, cpu or cuda.")
    offline: bool = Field(default=False, description="Fetch nothing.")

    _given: Chunker | None = PrivateAttr(default=None)
    _made: Chunker | None = PrivateAttr(default=None)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self._config()  # here, where pydantic does not wrap what it raises

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises the parser by."""
        return "RagkitNodeParser"

    @classmethod
    def from_chunker(cls, chunker: Chunker, **fields: Any) -> RagkitNodeParser:
        """Return a parser around a chunker of your own; `fields` are those of LlamaIndex's `NodeParser`.

        Such a parser cannot be pickled, which `IngestionPipeline` with `num_workers` does.
        """
        parser = cls(chunker=chunker.name, **fields)
        parser._given = chunker
        return parser

    def __getstate__(self) -> dict[str, Any]:
        if self._given is not None:
            raise UsageError(
                f"a node parser made from a chunker object ({self._given.name}) cannot be sent to other processes; "
                "name the chunker by the parser's settings instead, or run without num_workers"
            )
        # Of a copy: LlamaIndex takes what cannot be pickled out of the object itself, which others may be using.
        sent = copy.copy(self)
        sent._made = None  # models stay here; who receives it loads its own when it first cuts
        state: dict[str, Any] = super(RagkitNodeParser, sent).__getstate__()
        return state

    def _parse_nodes(self, nodes: Sequence[BaseNode], show_progress: bool = False, **kwargs: Any) -> list[BaseNode]:
        from llama_index.core.utils import get_tqdm_iterable

        parsed: list[BaseNode] = []
        for node in get_tqdm_iterable(nodes, show_progress, "Parsing nodes"):
            parsed += self._nodes_of(node)
        return parsed

    def _postprocess_parsed_nodes(self, nodes: list[BaseNode], parent_doc_map: dict[str, Any]) -> list[BaseNode]:
        spans = [(node.start_char_idx, node.end_char_idx) for node in nodes]
        done: list[BaseNode] = super()._postprocess_parsed_nodes(nodes, parent_doc_map)
        for node, (start, stop) in zip(done, spans, strict=True):
            node.start_char_idx, node.end_char_idx = start, stop
        return done

    def _nodes_of(self, node: BaseNode) -> list[BaseNode]:
        text = node.get_content(metadata_mode=MetadataMode.NONE)
        uri = next((str(node.metadata[key]) for key in _PLACE_KEYS if node.metadata.get(key)), node.node_id)
        document = Document.from_text(text, uri)
        chunks = with_metadata(document, self._chunker().chunk(document))
        made = build_nodes_from_splits([chunk.text for chunk in chunks], node, id_func=self.id_func)
        for one, chunk in zip(made, chunks, strict=True):
            _describe(one, chunk)
        return list(made)

    def _chunker(self) -> Chunker:
        if self._given is not None:
            return self._given
        if self._made is None:
            from ragkit.pipeline import Pipeline

            config = self._config()
            pipeline = Pipeline(Path(), config)  # for its models alone: no store is opened
            self._made = create_chunker(config.chunking, pipeline.tokenizer, pipeline)
        return self._made

    def _config(self) -> PipelineConfig:
        try:
            device = Device(self.device)
        except ValueError as error:
            raise UsageError(f"device must be one of {', '.join(Device)}, got {self.device!r}") from error
        return replace(
            _DEFAULTS,
            device=device,
            offline=self.offline,
            chunking=ChunkingConfig(self.chunker, self.max_tokens, self.overlap_tokens),
            generation=GenerationConfig(model=self.generator),
            embedding=EmbeddingConfig(model=self.embedder),
        )


def _describe(node: Any, chunk: Chunk) -> None:
    """Put the chunk's span and metadata on its node."""
    node.start_char_idx, node.end_char_idx = chunk.char_start, chunk.char_stop
    node.metadata = {**chunk.metadata, CHUNK_ID_KEY: chunk.chunk_id, TOKEN_COUNT_KEY: chunk.token_count}
    hidden = [CHUNK_ID_KEY, TOKEN_COUNT_KEY]
    node.excluded_embed_metadata_keys = [*node.excluded_embed_metadata_keys, *hidden]
    node.excluded_llm_metadata_keys = [*node.excluded_llm_metadata_keys, *hidden]
