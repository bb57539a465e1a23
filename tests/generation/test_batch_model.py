"""A batch with the bundled model, token for token."""

from __future__ import annotations

import pytest

from ragkit.config import BatchConfig
from ragkit.generation.batch_engine import BatchEngine
from ragkit.generation.batch_request import BatchRequest
from ragkit.generation.engine import Engine
from ragkit.generation.sampling import SamplingConfig
from ragkit.types import Chunk, chunk_id_of

TEXTS = (
    "WAL mode lets readers go on while a writer appends to the log. A checkpoint moves the log into the database.",
    "A STRICT table refuses values of other types than the column says. ANY keeps whatever it is given.",
    "The maximum size of a database is 281 terabytes. The page size is a power of two from 512 to 65536 bytes.",
    "SAVEPOINT opens a transaction inside a transaction. RELEASE ends it, ROLLBACK TO undoes it.",
)
QUESTIONS = ("Do readers block writers?", "What is a STRICT table?", "How large may a database be?", "What is ANY for?")


@pytest.mark.slow
@pytest.mark.models
def test_a_batch_of_the_bundled_model_gives_the_tokens_of_single_requests():
    engine = Engine.load("smollm2-135m-instruct", device="cpu", dtype="float32", kv_tokens=8192)
    builder = engine.prompt_builder()
    chunks = [Chunk(chunk_id_of(f"{at}", 0, 9), f"{at}", 0, text, 0, len(text), 30) for at, text in enumerate(TEXTS)]
    made = []
    for index in range(12):
        order = [chunks[(index + step) % 4] for step in range(1 + index % 4)]
        sampling = SamplingConfig(24, 0.8 * (index % 2), seed=index)
        built = builder.build(QUESTIONS[index % 4], order, max_new_tokens=24)
        made.append(BatchRequest(str(index), built.prompt, sampling))
    batch = BatchEngine(engine, BatchConfig(256))
    results = {one.request_id: one for one in batch.run(made)}
    for request in made:
        alone = list(engine.generate(request.prompt, request.sampling))[-1]
        assert results[request.request_id].finished.token_ids == alone.token_ids
    assert batch.stats.mixed_steps > 0
    assert batch.stats.prefill_tokens_shared > 11 * 30  # the system prompt, at least
