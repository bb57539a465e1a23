"""Which of the stored chunk KV the present settings find: the key of each record is made anew and compared."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ragkit.config import PipelineConfig
from ragkit.errors import RagkitError
from ragkit.generation.prompt import PromptBuilder
from ragkit.models import local_folder, weights_fingerprint
from ragkit.models.chat_template import ChatTemplate
from ragkit.models.model_config import load_model_config
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.store import Store
from ragkit.store.records import KVEntry

if TYPE_CHECKING:
    from ragkit.generation.engine import Engine
    from ragkit.generation.neighbours import ChunkNeighbours
    from ragkit.kvcache.kv_key import ContextKind, KVRecipe

_KEPT_CONTEXTS = 1024  # neighbours whose part of the key is kept

logger = logging.getLogger(__name__)


class PresentKV:
    """Says whether a chunk's record is what the present settings look for.

    Args:
        recipe: the model, its type and the codec.
        builder: the model's prompts, whose prefix chunks are computed behind.
        context: what chunks are computed behind.
        neighbours: the segments before a chunk, for the context `neighbours`.
    """

    def __init__(
        self, recipe: KVRecipe, builder: PromptBuilder, context: ContextKind, neighbours: ChunkNeighbours | None
    ) -> None:
        from ragkit.kvcache.kv_key import ChunkContext

        context_of = partial(ChunkContext.of, context, builder.prefix.token_ids)
        self._keys_behind = lru_cache(_KEPT_CONTEXTS)(lambda behind: recipe.keys_behind(context_of(behind)))
        self._chunk_end = builder.chunk_end
        self._neighbours = neighbours

    def uses(self, path: Path, entry: KVEntry) -> bool:
        """Return whether the record at `entry` of the segment `path` is used: its file is there, and so is its key."""
        from ragkit.kvcache.kv_segment import FileSource, KVMissError, record_token_ids

        try:
            with FileSource(path, entry.offset, entry.bytes) as source:
                token_ids = record_token_ids(source, entry.key)
        except KVMissError as error:
            logger.warning("%s", error)
            return False
        end = self._chunk_end
        return token_ids[len(token_ids) - len(end) :] == end and self._key(entry.chunk_id, token_ids) == entry.key

    def _key(self, chunk_id: str, token_ids: Sequence[int]) -> str:
        before = () if self._neighbours is None else self._neighbours(chunk_id)
        behind = tuple(token for segment in before for token in segment.token_ids)
        return self._keys_behind(behind)(token_ids).digest


def present_kv(store: Store, config: PipelineConfig, engine: Engine | None = None) -> PresentKV | None:
    """Return what judges the chunk KV in `store`; None where the generator is not at hand, and nothing can.

    Loads no model, but torch, which knows in which type a model computes here.

    Args:
        store: says which chunks are neighbours.
        config: the present settings.
        engine: the generator where it is loaded.
    """
    try:
        return _present_kv(store, config, engine)
    except RagkitError as error:
        logger.warning("%s", error)
        return None


def _present_kv(store: Store, config: PipelineConfig, engine: Engine | None) -> PresentKV | None:
    from ragkit.generation.neighbours import ChunkNeighbours
    from ragkit.generation.placement import resolve_device, resolve_dtype
    from ragkit.kvcache.codecs import make_codec
    from ragkit.kvcache.kv_key import ContextKind, KVRecipe
    from ragkit.kvcache.layout import KVLayout

    folder = local_folder(config.generation.model) if engine is None else engine.folder
    if folder is None:
        return None
    if engine is None:
        sizes, tokenizer = load_model_config(folder), ModelTokenizer(folder)
        builder = PromptBuilder(tokenizer, ChatTemplate(folder), sizes.max_context)
        dtype = resolve_dtype(config.generation.dtype, resolve_device(config.device))
    else:
        sizes, tokenizer, builder = engine.decoder.config, engine.tokenizer, engine.prompt_builder()
        dtype = engine.decoder.dtype
    codec = make_codec(config.kv.codec, KVLayout.of(sizes, dtype))
    recipe = KVRecipe(weights_fingerprint(folder), sizes, tokenizer.tokenizer_id, dtype, codec.codec_id)
    context, neighbours = ContextKind(config.kv.context), None
    if context is ContextKind.NEIGHBOURS:
        neighbours = ChunkNeighbours(store, builder, config.kv.neighbour_tokens, sizes.max_context)
    return PresentKV(recipe, builder, context, neighbours)
