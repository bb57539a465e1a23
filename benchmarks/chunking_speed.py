"""MB/s of the chunkers against those of chonkie and LlamaIndex, and of the models that bound them.

    python benchmarks/chunking_speed.py [--text FILE] [--megabytes 4.5] [--semantic-kb 200] [--perplexity-kb 20]
        [--rounds 3] [--cores 2] [--parts tokens characters semantic perplexity] [--record NAME]

The text is the King James Bible, which Debian's packages bible-kjv and bible-kjv-text bring (4.4 MB, public domain),
or FILE; without either, the corpora of chunking_evaluation in `RAGKIT_DATA`. All sides run in turns, in one process on
the same cores, with the bundled embedder's tokenizer and a cap of 256 tokens (of 800 characters in the second part);
a peer that is not installed (`pip install chonkie llama-index-core`) is left out with the reason. Figures are medians.
The semantic chunkers share one embedder, whose own time over the sentences is the bound; the perplexity chunker is set
against one full forward pass of the same model over the same tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import chunking_peers as peers
from report import data_folder, interleaved_samples, markdown_table, percentiles, write_result

from ragkit.chunking.characters import CharacterTokenizer
from ragkit.chunking.decoder_losses import DecoderLosses
from ragkit.chunking.perplexity import PerplexityOptions, PerplexityScorer, perplexity_chunker
from ragkit.chunking.registry import create_chunker
from ragkit.chunking.semantic import semantic_chunker
from ragkit.chunking.units import sentence_units
from ragkit.chunking.words import WordCounter
from ragkit.config import ChunkingConfig, EmbeddingConfig, PipelineConfig
from ragkit.models.resolve import resolve
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.pipeline import Pipeline
from ragkit.types import Document, TextTokenizer

CAP, CHARACTER_CAP = 256, 800
Chunk = Callable[[str], Sequence[str]]
Row = dict[str, Any]


def whole_text(file: Path | None, size: int) -> tuple[str, str]:
    """Return up to `size` bytes of text, and what it is."""
    if file is not None:
        text, source = file.read_text(encoding="utf-8"), file.name
    elif shutil.which("bible"):
        found = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True)
        text, source = found.stdout, "King James Bible (Debian bible-kjv-text)"
    elif (folder := data_folder("chunking_evaluation")) is not None:
        text = "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("corpora/*.md")))
        source = "the corpora of chunking_evaluation, where the Bible was not to be had"
    else:
        sys.exit("skipped: no text; install Debian's bible-kjv and bible-kjv-text, or give --text or RAGKIT_DATA")
    return first_lines(text, size), source


def first_lines(text: str, size: int) -> str:
    """Return the first lines of `text`, up to `size` bytes."""
    lines = text.encode()[:size].decode(errors="replace")
    return text if len(lines) >= len(text) else lines[: lines.rfind("\n") + 1]


def with_peers(sides: dict[str, Chunk], offered: Mapping[str, Callable[[], Chunk]]) -> list[str]:
    """Add the peers that are installed to `sides`; return why the others are not."""
    reasons = []
    for name, make in offered.items():
        try:
            sides[name] = make()
        except ImportError as error:
            reasons.append(f"{name} left out: {error}")
    return reasons


def ragkit_side(name: str, cap: int, tokenizer: TextTokenizer) -> Chunk:
    """Return a chunker of the registry, made anew for every text so that no word is remembered."""

    def chunk(text: str) -> list[str]:
        chunker = create_chunker(ChunkingConfig(name, cap), tokenizer)
        return [chunk.text for chunk in chunker.chunk(Document.from_text(text))]

    return chunk


def timed(sides: Mapping[str, Chunk], text: str, rounds: int, count: Callable[[list[str]], list[int]]) -> list[Row]:
    """Return a row a side: its speed over `rounds`, and what it made of `text`; a first, short text warms up."""
    for chunk in sides.values():
        chunk(first_lines(text, 4_000))
    made: dict[str, list[str]] = {}

    def run(name: str, chunk: Chunk) -> None:
        made[name] = list(chunk(text))

    calls = {name: lambda name=name, chunk=chunk: run(name, chunk) for name, chunk in sides.items()}
    samples = interleaved_samples(calls, rounds, warmup=0)
    megabytes = len(text.encode()) / 1e6
    rows = []
    for name, seconds in samples.items():
        median = percentiles(seconds, at=(50,))["p50"]
        row: Row = {"side": name, "MB/s": megabytes / median, "seconds": median, "samples": seconds}
        if made[name]:
            row |= {"chunks": len(made[name]), "largest chunk": max(count(made[name]))}
            row["keeps the text"] = "yes" if "".join(made[name]) == text else "no"
        rows.append(row)
    return rows


def tokens_part(text: str, rounds: int) -> tuple[list[Row], list[str]]:
    """Return the rows of the chunkers under a cap of tokens, and of the tokenizer alone."""
    folder = resolve(EmbeddingConfig().model)
    tokenizer, plain = ModelTokenizer(folder), peers.plain_tokenizer(folder)

    def alone(text: str) -> list[str]:
        tokenizer.encode(text)
        return []

    def alone_by_lines(text: str) -> list[str]:
        tokenizer.count_batch(text.splitlines(keepends=True))
        return []

    sides: dict[str, Chunk] = {
        f"ragkit {name}": ragkit_side(name, CAP, tokenizer) for name in ("recursive", "sentence")
    }
    reasons = with_peers(
        sides,
        {
            "chonkie recursive": lambda: peers.chonkie_recursive(plain, CAP),
            "chonkie sentence": lambda: peers.chonkie_sentence(plain, CAP),
            "LlamaIndex SentenceSplitter": lambda: peers.llama_index_sentence(plain, CAP),
        },
    )
    sides |= {"tokenizer alone, in one call": alone, "tokenizer alone, line by line": alone_by_lines}
    return timed(sides, text, rounds, tokenizer.count_batch), reasons


def characters_part(text: str, rounds: int) -> tuple[list[Row], list[str]]:
    """Return the rows of the chunkers under a cap of characters."""
    tokenizer = CharacterTokenizer()
    names = ("recursive", "sentence", "token")
    sides = {f"ragkit {name}": ragkit_side(name, CHARACTER_CAP, tokenizer) for name in names}
    return timed(sides, text, 3 * rounds, tokenizer.count_batch), []


def semantic_part(text: str, rounds: int, pipeline: Pipeline) -> tuple[list[Row], list[str]]:
    """Return the rows of the semantic chunkers, and of one embedding of every sentence."""
    folder = resolve(EmbeddingConfig().model)
    tokenizer, plain = ModelTokenizer(folder), peers.plain_tokenizer(folder)
    units = sentence_units(text, WordCounter(tokenizer), CAP)
    sentences = units.texts(text, 0, len(units))
    embedders: dict[str, peers.CountingEmbedder] = {}

    def embedder(name: str) -> peers.CountingEmbedder:
        return embedders.setdefault(name, peers.CountingEmbedder(pipeline.embedder))

    def ragkit(text: str) -> list[str]:
        chunker = semantic_chunker(ChunkingConfig("semantic", CAP), tokenizer, embedder("ragkit semantic"))
        return [chunk.text for chunk in chunker.chunk(Document.from_text(text))]

    def embedding(given: str) -> list[str]:
        embedder("every sentence embedded once").encode(sentences if given is text else [given])
        return []

    sides: dict[str, Chunk] = {"ragkit semantic": ragkit}
    reasons = with_peers(
        sides,
        {
            name: lambda name=name, make=make: make(plain, CAP, embedder(name))  # type: ignore[misc]
            for name, make in {
                "chonkie SemanticChunker": peers.chonkie_semantic,
                "LlamaIndex SemanticSplitter": peers.llama_index_semantic,
            }.items()
        },
    )
    rows = timed(sides | {"every sentence embedded once": embedding}, text, rounds, tokenizer.count_batch)
    for row in rows:  # the warming up is counted too: small beside the rounds
        row["characters embedded a character"] = embedders[row["side"]].characters / (rounds * len(text))
    return rows, reasons


def perplexity_part(text: str, rounds: int, pipeline: Pipeline) -> tuple[list[Row], list[str]]:
    """Return the rows of the perplexity chunker and of one full forward pass over its tokens."""
    engine = pipeline.engine
    tokenizer = engine.tokenizer
    losses = DecoderLosses(engine.decoder)
    forwarded: dict[str, int] = {}

    def ragkit(text: str) -> list[str]:
        before = losses.tokens_forwarded
        scorer = PerplexityScorer(losses, tokenizer, engine.model_name, PerplexityOptions())
        chunker = perplexity_chunker(ChunkingConfig("perplexity", CAP), tokenizer, scorer)
        chunks = chunker.chunk(Document.from_text(text))
        forwarded["ragkit perplexity"] = losses.tokens_forwarded - before
        return [chunk.text for chunk in chunks]

    def full_pass(text: str) -> list[str]:
        ids = tokenizer.encode(text)
        engine.token_losses(ids)
        forwarded["one full forward pass"] = len(ids)
        return []

    rows = timed({"ragkit perplexity": ragkit, "one full forward pass": full_pass}, text, rounds, tokenizer.count_batch)
    return [row | {"tokens forwarded": forwarded[row["side"]]} for row in rows], []


# (part, side, against, what the ratio of their speeds should be at least); against a number: MB/s
PROMISES: tuple[tuple[str, str, str | None, float], ...] = (
    ("tokens", "ragkit recursive", "chonkie recursive", 1.0),
    ("tokens", "ragkit recursive", None, 1.5),
    ("tokens", "ragkit sentence", "chonkie sentence", 3.0),
    ("characters", "ragkit recursive", None, 20.0),
    ("characters", "ragkit sentence", None, 20.0),
    ("semantic", "ragkit semantic", "every sentence embedded once", 1 / 1.1),
    ("semantic", "ragkit semantic", "chonkie SemanticChunker", 2.0),
    ("semantic", "ragkit semantic", "LlamaIndex SemanticSplitter", 2.0),
    ("perplexity", "ragkit perplexity", "one full forward pass", 1 / 1.1),
)


def promises(parts: Mapping[str, Sequence[Row]]) -> list[Row]:
    """Return a row for each promise whose sides were measured."""
    found = []
    for part, side, against, least in PROMISES:
        speeds = {row["side"]: float(row["MB/s"]) for row in parts.get(part, ())}
        if side not in speeds or (against is not None and against not in speeds):
            continue
        value = speeds[side] / speeds[against] if against else speeds[side]
        goal = f"times {against}" if against else "MB/s"
        facts = {"part": part, "side": side, "measured": value, "at least": least, "of": goal}
        found.append(facts | {"kept": "yes" if value >= least else "NO"})
    return found


def on_cores(count: int) -> int:
    """Keep this process on `count` cores, as many threads in every library; return how many there are."""
    import torch

    cores = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, cores)
    os.environ["RAYON_NUM_THREADS"] = str(len(cores))  # read when the first batch is tokenised
    torch.set_num_threads(len(cores))
    return len(cores)


def main() -> None:
    """Measure the parts one after another and keep the record."""
    names = ("tokens", "characters", "semantic", "perplexity")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--megabytes", type=float, default=4.5)
    parser.add_argument("--semantic-kb", type=float, default=200)
    parser.add_argument("--perplexity-kb", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--record", default="chunking_speed", help="name of the file of raw numbers")
    options = parser.parse_args()
    cores = on_cores(options.cores)
    text, source = whole_text(options.text, int(options.megabytes * 1e6))
    pipeline = Pipeline(Path(), PipelineConfig())  # for its models alone
    some, few = (first_lines(text, int(1000 * size)) for size in (options.semantic_kb, options.perplexity_kb))
    measures: dict[str, Callable[[], tuple[list[Row], list[str]]]] = {
        "tokens": lambda: tokens_part(text, options.rounds),
        "characters": lambda: characters_part(text, options.rounds),
        "semantic": lambda: semantic_part(some, options.rounds, pipeline),
        "perplexity": lambda: perplexity_part(few, options.rounds, pipeline),
    }
    parts: dict[str, list[Row]] = {}
    reasons: list[str] = []
    for part in options.parts:
        parts[part], left_out = measures[part]()
        reasons += left_out
        columns = [name for name in dict.fromkeys(key for row in parts[part] for key in row) if name != "samples"]
        print(f"\n{part}\n\n{markdown_table(parts[part], columns)}", flush=True)
    kept = promises(parts)
    print("\n" + markdown_table(kept, ["part", "side", "measured", "at least", "of", "kept"]))
    print("\n".join(["", *reasons]))
    facts = {"text": source, "bytes": len(text.encode()), "semantic_bytes": len(some.encode())}
    facts |= {
        "perplexity_bytes": len(few.encode()),
        "cores": cores,
        "rounds": options.rounds,
        "cap": CAP,
        "character_cap": CHARACTER_CAP,
    }
    result = {**facts, "left_out": reasons, "parts": parts, "promises": kept, "peers": peers.releases()}
    print(f"raw numbers: {write_result(options.record, result)}")


if __name__ == "__main__":
    main()
