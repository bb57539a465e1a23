"""How much sooner a batch is answered than its requests one by one, and what sharing saves.

On a GPU: the shape of Llama 3 8B in bf16 with random weights; 1,000 requests of 8 chunks of 512 tokens, drawn like
Zipf (s = 1) from 2,000 chunks, 64 tokens of answer each. Chunk KV lies in page-locked memory as int4 (34 GB; in bf16 it
would be 134 GB), and in the KV pool as far as the tier there has room.

    python benchmarks/batch_speed.py                            # all of (a): blend, full, transformers
    python benchmarks/batch_speed.py --parts blend              # or blend, full, transformers alone
    python benchmarks/batch_speed.py --tiny --device cpu        # the same with a tiny model, to try the script

`blend` compares the batch with `Engine.generate` in a loop over the first 100 requests, and private with shared rows.
`full` compares sharing off, on, and on with a free order of chunks, on the first 300 requests. `transformers` is
`generate` with left-padded batches of several sizes, each timed on one batch and extrapolated to all requests.

On a CPU: the bundled model answers 60 questions over examples/collection, 64 tokens forced, by `Pipeline.query` in a
loop and by `Pipeline.query_many`; where tokens differ, the two best logits there are compared with the noise of shapes.

    python benchmarks/batch_speed.py --cpu [--strategy blend]

By default these prompts are prefilled whole (`blend.min_tokens`); with `--strategy blend` chunk KV is made before.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from batch_collection import on_collection
from batch_random_model import TINY, Scale, on_random_model
from report import write_result

from ragkit.config import Strategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="the bundled model over the collection of the examples")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of the random model")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model; nothing is written")
    parser.add_argument("--parts", nargs="*", default=["transformers", "blend", "full"], help="of the random model")
    parser.add_argument("--requests", type=int, help="of the batch")
    parser.add_argument("--full-requests", type=int, help="of the comparison of sharing")
    parser.add_argument("--questions", type=int, default=60, help="with --cpu")
    parser.add_argument("--strategy", default="auto", choices=["auto", "full", "blend"], help="with --cpu")
    parser.add_argument("--rounds", type=int, default=1, help="with --cpu")
    arguments = parser.parse_args()
    if arguments.cpu:
        result = on_collection(arguments.questions, arguments.rounds, Strategy(arguments.strategy))
        name = "batch_speed_cpu" + ("_blend" if arguments.strategy == "blend" else "")
        print(f"\nraw numbers: {write_result(name, result)}")
        return
    scale = TINY if arguments.tiny else Scale()
    scale = dataclasses.replace(
        scale, requests=arguments.requests or scale.requests, full=arguments.full_requests or scale.full
    )
    with torch.inference_mode():
        result = on_random_model(torch.device(arguments.device), scale, arguments.tiny, arguments.parts)
    if not arguments.tiny:
        print(f"\nraw numbers: {write_result('batch_speed_' + '_'.join(sorted(arguments.parts)), result)}")


if __name__ == "__main__":
    main()
