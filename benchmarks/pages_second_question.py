"""How soon a question about a document that was read into pages gets its first token: from the GPU, RAM and disk.

    python benchmarks/pages_second_question.py MODEL TEXT
    python benchmarks/pages_second_question.py qwen.gguf bible.txt --codec int4 --store /fast/disk/store

Reads the document once (`ragkit ingest --pages`), then asks in new processes: whose files were pushed out of the
system's cache, and whose files are in it; that bring all pages to the GPU before they answer, and that keep them in
host memory and bring the ones that are found (`pages.gpu_mb` 0). Each asks a second question, another one, when the
document is open. Timed is everything from the question to the first token: the document's tokens and pages, what the
selector keeps, the question. Models are loaded and kernels compiled before. Figures are written to the raw file as each
process ends. A store that is given and holds the document already is not read again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from report import markdown_table, write_result

QUESTIONS = ("Who built the ark?", "How many years did Methuselah live?", "Who was thrown into the lions' den?")
COLUMNS = {
    "pages_from": "Pages from", "first_token_ms": "First token, ms", "read_mb": "MB read", "tokens": "Tokens",
}  # fmt: skip


def main() -> None:
    """Read the document, ask about it in processes of their own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name, folder, GGUF file or hub id")
    parser.add_argument("text", type=Path, help="the document")
    parser.add_argument("--store", type=Path, help="where it is read to; a temporary folder without")
    parser.add_argument("--codec", default="int4", help="of pages")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--window-tokens", type=int, help="pages.window_tokens")
    parser.add_argument("--pages-on", choices=["gpu", "host"], default="gpu", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["read", "ask"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps({"read": read_document, "ask": ask}[arguments.child](arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments.store = arguments.store or Path(folder) / "store"
        result: dict[str, Any] = {"model": Path(arguments.model).name, "codec": arguments.codec, "rows": []}
        result["reading"] = child(arguments, "read")
        print(f"reading: {result['reading']}", flush=True)
        for place in ("gpu", "host"):
            arguments.pages_on = place
            evicted = drop_from_cache(arguments.store)
            for files in ("disk" if evicted else "disk (cache not emptied)", "RAM"):
                asked = child(arguments, "ask")
                whole = "all to the GPU" if place == "gpu" else "the found ones to the GPU"
                result["rows"] += [
                    {"pages_from": f"{files}, {whole}", **asked["first"]},
                    {"pages_from": "the same process, document open", **asked["second"]},
                ]
                result.setdefault("answers", []).append(asked["answer"])
                print(f"raw numbers: {write_result('pages_second_question', result)}", flush=True)
    print(markdown_table(result["rows"], COLUMNS))


def read_document(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what reading the document took."""
    with pipeline_of(arguments) as pipeline:
        warm_up(pipeline)
        started = time.perf_counter()
        report = pipeline.ingest([arguments.text], pages=True)
        assert report.pages is not None, "pages were asked for"
        if report.warnings:
            print(*report.warnings, sep="\n", file=sys.stderr)
        return {
            "seconds": time.perf_counter() - started, "pages_seconds": report.timings_s["pages"],
            "tokens": report.pages.tokens, "bytes": report.pages.bytes, "documents": report.pages.read,
            "present": report.pages.present,
        }  # fmt: skip


def ask(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what two questions of one process took, whose models are loaded before."""
    with pipeline_of(arguments) as pipeline:
        warm_up(pipeline)
        first, second = (asked(pipeline, question, arguments.text) for question in QUESTIONS[:2])
    return {"first": first[0], "second": second[0], "answer": first[1]}


def asked(pipeline: Any, question: str, text: Path) -> tuple[dict[str, Any], str]:
    """Return the row of one question, and its answer."""
    answer = pipeline.query(question, document=str(text.resolve()))
    if "read_document" in answer.timings_ms:
        raise SystemExit("the document was read again: its pages were not found")
    return {
        "first_token_ms": answer.timings_ms["first_token"], "tokens": answer.tokens.prompt,
        "read_mb": sum(answer.kv.bytes_by_tier.values()) / 1e6, "timings_ms": dict(answer.timings_ms),
    }, answer.text  # fmt: skip


def warm_up(pipeline: Any) -> None:
    """Load the models, and compile the kernels of attention over pages with a short document that nobody stores."""
    import torch

    from ragkit.config import KVConfig
    from ragkit.generation.paging import PagedText, Paging
    from ragkit.generation.sampling import SamplingConfig

    _ = pipeline.parts.embedder
    engine, config = pipeline.engine, pipeline.config
    if engine.decoder.device.type != "cuda":
        return
    paging = Paging(engine, config.pages, KVConfig(), None)
    options = paging.prefill.options
    count = 8 + options.sink_pages + options.local_pages + options.budget_pages * options.found_times
    text = "And it came to pass. " * (count * options.page_size // 4)
    with paging.document(PagedText("warm", text, "warm")) as opened:
        paging.read(opened)
        for _ in paging.answer(opened, QUESTIONS[2], SamplingConfig(6)).steps():
            pass
    paging.close()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def pipeline_of(arguments: argparse.Namespace) -> Any:
    """Return the pipeline over the store."""
    from ragkit.config import Device, Strategy
    from ragkit.pipeline import Pipeline
    from ragkit.settings import load_settings

    config = load_settings().config
    pages = replace(config.pages, codec=arguments.codec)
    if arguments.pages_on == "host":
        pages = replace(pages, gpu_mb=0)
    if arguments.window_tokens:
        pages = replace(pages, window_tokens=arguments.window_tokens)
    generation = replace(config.generation, model=arguments.model, strategy=Strategy.PAGES, max_new_tokens=16)
    kv = replace(config.kv, disk_mb=max(config.kv.disk_mb, 32768))
    return Pipeline(
        arguments.store, replace(config, device=Device(arguments.device), pages=pages, generation=generation, kv=kv)
    )


def child(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """Return what a new process gives."""
    command = [
        sys.executable, __file__, arguments.model, str(arguments.text), "--store", str(arguments.store),
        "--codec", arguments.codec, "--device", arguments.device, "--pages-on", arguments.pages_on, "--child", name,
    ]  # fmt: skip
    if arguments.window_tokens:
        command += ["--window-tokens", str(arguments.window_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the process that was to {name} failed with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def drop_from_cache(folder: Path) -> bool:
    """Push all files of a folder out of the system's cache; return whether that can be asked for here."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


if __name__ == "__main__":
    main()
