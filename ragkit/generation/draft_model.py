"""A model that drafts: its weights, what reads prompts for it, and what it costs beside the one that verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ragkit.generation.contiguous_draft import ChainRunner, ContiguousDraftRunner
from ragkit.generation.decode_runner import DecodeRunner
from ragkit.generation.draft_runner import DraftRunner
from ragkit.generation.full_prefill import FullPrefill
from ragkit.generation.strategy import PrefillStrategy
from ragkit.generation.weight_bytes import weight_bytes

if TYPE_CHECKING:
    from ragkit.generation.decoder import Decoder
    from ragkit.generation.engine import Engine


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What drafts: weights, and where their KV lies.

    Attributes:
        engine: whose pool and rotary tables are used.
        decoder: the weights; the engine's own, or a cheaper variant with KV of the same shape.
        runner: drafts chains with them.
        strategy: brings the prompt's rows into the pool.
        weight_bytes: bytes that a step reads of them.
        reader: the weights that the prompt's rows are computed with.
    """

    engine: Engine
    decoder: Decoder
    runner: ChainRunner
    strategy: PrefillStrategy
    weight_bytes: int
    reader: Decoder

    @classmethod
    def of(
        cls, engine: Engine, decoder: Decoder | None = None, strategy: PrefillStrategy | None = None,
        reader: Decoder | None = None,
    ) -> DraftModel:  # fmt: skip
        """Return the model of `engine`, or a variant of it; its prompts are computed in full by default.

        Args:
            engine: the model.
            decoder: a variant of its weights with KV of the same shape.
            strategy: brings prompts' rows into the pool.
            reader: computes them, and what a draft is far behind; the variant itself by default. Weights of 4 bits are
                made for few rows, and rows of the true weights serve them as well.
        """
        decoder = decoder or engine.decoder
        reader = reader or decoder
        on_gpu = decoder.device.type == "cuda"
        runner = graph_runner(engine, decoder, reader) if on_gpu else ContiguousDraftRunner(decoder)
        return cls(engine, decoder, runner, strategy or FullPrefill(), weight_bytes(decoder), reader)

    def step_share(self, target: Engine, tokens: int, target_tokens: int) -> float:
        """Return the bytes of a step behind so many tokens over those of a plain step of the target behind its own."""
        own = self.weight_bytes + tokens * self.decoder.layout.bytes_per_token
        return own / (weight_bytes(target.decoder) + target_tokens * target.decoder.layout.bytes_per_token)


def graph_runner(engine: Engine, decoder: Decoder, reader: Decoder | None = None) -> DraftRunner:
    """Return the runner of `decoder`, whose rows lie in the engine's pool, with what it will replay recorded."""
    assert isinstance(engine.step_runner, DecodeRunner), "on a GPU steps are graphs"
    runner = DraftRunner(decoder, engine.pool, engine.step_runner.scratch_slot, reader)
    engine.record_ahead(runner.prepare)
    return runner
