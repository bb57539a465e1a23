"""Tokens a second of every way to embed documents, against sentence-transformers' own `encode`, and what limits them.

    RAGKIT_DATA=... python benchmarks/embedding_speed.py [--chunks 300] [--rounds 3] [--only NAME...]

Every way embeds the same chunks (chunking_evaluation, cut as the product cuts) in turns; its vectors must agree with
sentence-transformers' within 1e-5. "side by side" runs as many batches at a time as torch has threads, each in a Python
thread with one OpenMP thread; the others run one batch with all of them. Where others use the machine as well it looks
better than it is: a team of threads waits for its last one at every operation. The second table gives the matrix
products of one layer in GFLOP/s and the tokens a second that they alone would allow: MKL, which torch uses for plain
fp32 products, and oneDNN with packed weights.
"""

from __future__ import annotations

import argparse
import ctypes
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from report import interleaved, markdown_table, write_result
from retrieval_data import load_question_sets

from ragkit.models import resolve
from ragkit.retrieval.bert_numpy import NumpyBert
from ragkit.retrieval.bert_torch import TorchBert, onednn_works
from ragkit.retrieval.bert_weights import BertWeights
from ragkit.retrieval.encoder import BertEncoder, Forward
from ragkit.retrieval.model_folder import ModelFolder, read_model_folder
from ragkit.retrieval.sentence_transformer import SentenceTransformerEmbedder
from ragkit.retrieval.token_states import batches
from ragkit.retrieval.windows import pool_windows, unit_rows

BASELINE = "sentence-transformers encode"
BATCHES = (1024, 2048, 4096, 8192, 16384)


def thin(folder: ModelFolder, forward: Forward, batch_tokens: int) -> BertEncoder:
    """Return a thin encoder that always runs `forward`."""
    encoder = BertEncoder(folder, batch_tokens=batch_tokens)
    encoder._forward_for = lambda tokens: forward  # type: ignore[method-assign]
    return encoder


def plain_torch(weights: BertWeights) -> TorchBert:
    """Return the torch forward without oneDNN's packed products."""
    from ragkit.retrieval import bert_torch

    bert_torch.onednn_works = lambda: False
    try:
        return TorchBert(weights, "cpu")
    finally:
        bert_torch.onednn_works = onednn_works


def side_by_side(
    folder: ModelFolder, forward: Forward, batch_tokens: int
) -> Callable[[list[str]], NDArray[np.float32]]:
    """Return what embeds texts in threads of one OpenMP thread each, which take batches of `batch_tokens`."""
    encoder = BertEncoder(folder)
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=_leave_the_team)

    def encode(texts: list[str]) -> NDArray[np.float32]:
        windows = encoder._tokenise(texts, "")
        lengths = np.array([len(ids) for ids in windows.token_ids])
        vectors = np.empty((len(lengths), encoder.dim), dtype=np.float32)

        def embed(rows: NDArray[np.int64]) -> None:
            packed = np.concatenate([np.asarray(windows.token_ids[row], dtype=np.int64) for row in rows])
            vectors[rows] = unit_rows(forward.pooled(packed, lengths[rows]))

        list(pool.map(embed, batches(lengths, batch_tokens)))
        return pool_windows(vectors, windows.weights, windows.owners, len(texts))

    return encode


def _leave_the_team() -> None:
    """Give this thread alone one OpenMP thread; `torch.set_num_threads` would give that to all that come later."""
    torch.get_num_threads()  # what torch sets on a thread's first use is set now
    ctypes.CDLL(None).omp_set_num_threads(1)
    assert torch.get_num_threads() == 1


def ways(folder: ModelFolder, texts: list[str]) -> dict[str, Callable[[], NDArray[np.float32]]]:
    """Return the ways to embed `texts` by name, the baseline first."""
    reference = SentenceTransformerEmbedder(folder)
    weights = BertEncoder(folder)._weights
    packed = TorchBert(weights, "cpu")
    found: dict[str, Callable[[], NDArray[np.float32]]] = {
        BASELINE: lambda: reference._model.encode(texts, normalize_embeddings=True),
        "ragkit through sentence-transformers": lambda: reference.encode(texts),
    }
    for batch_tokens in BATCHES:
        encoder = thin(folder, packed, batch_tokens)
        found[f"thin encoder, {packed.name}, {batch_tokens} tokens"] = lambda encoder=encoder: encoder.encode(texts)
    for batch_tokens in BATCHES:
        embed = side_by_side(folder, packed, batch_tokens)
        found[f"side by side, {packed.name}, {batch_tokens} tokens"] = lambda embed=embed: embed(texts)
    for forward in (plain_torch(weights), NumpyBert(weights)):
        encoder = thin(folder, forward, 4096)
        found[f"thin encoder, {forward.name}, 4096 tokens"] = lambda encoder=encoder: encoder.encode(texts)
    return found


def ceilings(weights: BertWeights, tokens: int = 4096) -> list[dict[str, Any]]:
    """Return GFLOP/s of one layer's products through MKL and oneDNN, and the tokens a second they would allow."""
    layer = weights.layers[0]
    matrices = [torch.from_numpy(np.array(matrix)) for matrix in (layer.qkv, layer.out, layer.up, layer.down)]
    inputs = [torch.randn(tokens, matrix.shape[1]) for matrix in matrices]
    operations = sum(2 * tokens * matrix.numel() for matrix in matrices)
    functions: dict[str, Callable[[], object]] = {
        "MKL": lambda: [torch.nn.functional.linear(x, matrix) for x, matrix in zip(inputs, matrices, strict=True)]
    }
    if onednn_works():
        product = torch.ops.mkldnn._linear_pointwise.default
        packed = [torch.ops.mkldnn._reorder_linear_weight(matrix) for matrix in matrices]
        functions["oneDNN, packed"] = lambda: [
            product(x, matrix, None, "none", [], "") for x, matrix in zip(inputs, packed, strict=True)
        ]
    with torch.inference_mode():
        seconds = interleaved(functions, rounds=9, warmup=2)
    return [
        {
            "products": name,
            "GFLOP/s": operations / value / 1e9,
            "tokens/s of the products alone": tokens / value / len(weights.layers),
        }
        for name, value in seconds.items()
    ]


def main() -> None:
    """Check that all ways agree, then measure them in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="only ways whose names begin so, and the baseline")
    arguments = parser.parse_args()
    (data,) = load_question_sets(["chunking_evaluation"])
    texts = [chunk.text for chunks in data.chunks.values() for chunk in chunks]
    texts = random.Random(0).sample(texts, min(arguments.chunks, len(texts)))
    folder = read_model_folder(resolve("all-minilm-l6-v2"))
    encoder = BertEncoder(folder)
    short = [text for text in texts if len(encoder._tokenise([text], "").owners) == 1]
    functions = ways(folder, short)
    if arguments.only:
        wanted = (BASELINE, *arguments.only)
        functions = {name: function for name, function in functions.items() if name.startswith(wanted)}
    expected = functions[BASELINE]()
    differences = {name: float(np.abs(function() - expected).max()) for name, function in functions.items()}
    wrong = [name for name, difference in differences.items() if difference > 1e-5]
    if wrong:
        raise SystemExit(f"not equal to sentence-transformers: {', '.join(wrong)}")
    tokens = int(encoder._tokenise(short, "").weights.sum())
    seconds = interleaved(functions, rounds=arguments.rounds)
    rows = [
        {
            "way": name,
            "tokens/s": tokens / value,
            "times the baseline": seconds[BASELINE] / value,
            "largest difference": differences[name],
        }
        for name, value in seconds.items()
    ]
    print(f"{len(short)} chunks of one window, {tokens} tokens, {torch.get_num_threads()} threads\n")
    print(markdown_table(rows, list(rows[0])))
    if arguments.only:
        return
    limits = ceilings(encoder._weights)
    print("\n" + markdown_table(limits, list(limits[0])))
    write_result(
        "embedding_speed",
        {"chunks": len(short), "tokens": tokens, "threads": torch.get_num_threads(), "ways": rows, "limits": limits},
    )


if __name__ == "__main__":
    main()
