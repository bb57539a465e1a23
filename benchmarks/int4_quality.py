"""How far a copy with weights of 4 bits is from its model: the divergence of the next token, by columns of a group.

    python benchmarks/int4_quality.py [--generator smollm2-135m-instruct] [--tokens 1024]

Plain text, this project's own documentation, in fp32. KL(model || copy) in nats, the share of tokens that both find
most likely, and the overlap sum(min(p, q)): the chance that a token drawn from the copy stands (arXiv 2211.17192,
theorem 3.5). A model that was stored in groups of 32 itself loses next to nothing in groups of 32: nobody should
conclude from it on others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from report import markdown_table, write_result
from torch import Tensor

from ragkit.generation.attention import StandaloneAttention
from ragkit.generation.decoder import Decoder
from ragkit.generation.projection import Linear, Projection
from ragkit.generation.rotary_cache import RotaryCache
from ragkit.generation.weights import load_weights
from ragkit.kernels.int4_linear import GROUPS, quantize_int4
from ragkit.models import resolve
from ragkit.models.tokenizer import ModelTokenizer

TEXT = Path(__file__).resolve().parents[1] / "docs" / "blending.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=1024)
    arguments = parser.parse_args()
    folder, device = resolve(arguments.generator), torch.device("cpu")
    tokens = torch.tensor(ModelTokenizer(folder).encode(TEXT.read_text(encoding="utf-8"))[: arguments.tokens])
    with torch.inference_mode():
        model = Decoder.load(folder, device, torch.float32)
        expected = log_shares(model, tokens)
        rows = []
        for group in GROUPS:
            for keeps_vocabulary in (False, True):
                weights = load_weights(
                    folder, model.config, device, torch.float32, rounded(group, keeps_vocabulary, model)
                )
                row = {"group": group, "vocabulary": "as it is" if keeps_vocabulary else "4 bits"}
                rows.append(row | distances(expected, log_shares(Decoder(model.config, weights), tokens)))
                print(rows[-1], flush=True)
    print(markdown_table(rows, list(rows[0])))
    result: dict[str, Any] = {**vars(arguments), "text": TEXT.name, "copies": rows}
    print(f"raw numbers: {write_result('int4_quality', result)}")


def rounded(group: int, keeps_vocabulary: bool, model: Decoder) -> Callable[[Tensor, Tensor | None], Linear]:
    """Return what makes products of rounded weights, as numbers; groups that do not fit are the next smaller ones."""

    def project(weight: Tensor, bias: Tensor | None) -> Linear:
        if keeps_vocabulary and len(weight) == model.config.vocab_size:
            return Projection(weight, bias)
        fitting = next(size for size in GROUPS if size <= group and weight.shape[1] % size == 0)
        return Projection(quantize_int4(weight, fitting).numbers(weight.dtype), bias)

    return project


def log_shares(model: Decoder, tokens: Tensor) -> Tensor:
    """Return (tokens, vocab_size) logarithms of the next token's distribution."""
    attend = StandaloneAttention(RotaryCache(model).table(len(tokens), len(tokens)), model.scale, keep=False)
    return model.logits(model.run(tokens, attend)).log_softmax(-1)


def distances(expected: Tensor, got: Tensor) -> dict[str, float]:
    """Return how far apart two models are, over all tokens."""
    return {
        "kl": float((expected.exp() * (expected - got)).sum(-1).mean()),
        "same_first": float((expected.argmax(-1) == got.argmax(-1)).float().mean()),
        "overlap": float(torch.minimum(expected.exp(), got.exp()).sum(-1).mean()),
    }


if __name__ == "__main__":
    main()
