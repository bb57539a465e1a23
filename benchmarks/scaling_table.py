"""Calculates the tables of docs/scaling.md from measured costs; nothing is timed here.

    python benchmarks/scaling_table.py            writes the tables into docs/scaling.md
    python benchmarks/scaling_table.py --check    exits with 1 where the page is not what it would write

The costs come from raw results: `stage_sizes.json` and, where they are there, `stage_costs_cpu.json` and
`stage_costs_cuda.json` (`stage_costs.py`), else `ingest_speed.json`, `prefill_decode_gpu.json` and `faiss_gpu.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, markdown_table

PAGE = ROOT / "docs" / "scaling.md"
START, STOP = "<!-- begin: benchmarks/scaling_table.py -->", "<!-- end -->"

GPUS = (1, 8, 64)
PAGES = (10**6, 10**7, 10**8, 10**9)
CORES_A_GPU = 16  # of the machine that the GPU figures were measured on
WIRE_BYTES_PER_S = 1.25e9  # 10 Gbit/s into the committer's machine
MEMORY_BYTES = 1e12  # of the machine that holds the index


@dataclass(frozen=True)
class Costs:
    """What a page of the reports takes, and where each figure stands."""

    tokens: float
    chunks: float
    prepare_core_s: float
    embed_core_s: float
    embed_gpu_tokens_per_s: float | None
    commit_s_per_chunk: tuple[tuple[float, float], ...]
    message_bytes: float
    catalogue_bytes: float
    vector_bytes: float
    kv_tokens_per_s: float
    kv_bytes: dict[str, float]
    index_s_per_million: float
    sources: dict[str, str]

    def commit_s(self, chunks: float) -> float:
        """Return the seconds of committing so many chunks, at what a commit was measured to take in each size."""
        total = done = 0.0
        for size, cost in self.commit_s_per_chunk:
            step = min(size, chunks) - done
            if step > 0:
                total, done = total + step * cost, done + step
        return total + (chunks - done) * self.commit_s_per_chunk[-1][1]


def result_of(name: str) -> dict[str, Any] | None:
    """Return the result in a raw file, or None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.is_file() else None


def needed(name: str) -> dict[str, Any]:
    """Return the result in a raw file that must be there."""
    result = result_of(name)
    if result is None:
        raise SystemExit(f"{RESULTS / name}.json is missing: run the benchmark that writes it")
    return result


def read_costs() -> Costs:
    """Return the costs of a page from the raw results."""
    sizes, cpu, cuda = needed("stage_sizes"), result_of("stage_costs_cpu"), result_of("stage_costs_cuda")
    pages = sizes["pages"]
    sources = {"sizes": "stage_sizes.json", "index": "faiss_gpu.json"}
    if cpu is not None:
        prepare = cpu["read_cpu_s_per_page"] + cpu["chunk_cpu_s_per_page"]
        embed = cpu["embed_cpu_s_per_page"]
        commits = tuple((one["catalogue_chunks"], one["s_per_chunk"]) for one in cpu["commits"])
        sources |= dict.fromkeys(("prepare", "embed", "commit"), "stage_costs_cpu.json")
    else:
        (ingest,) = (one for one in needed("ingest_speed")["collections"] if one["collection"] == "sec_10q")
        commit = ingest["stages_s"]["commit"]
        prepare = (ingest["cpu_outside_s"] - commit) / pages
        embed = ingest["cpu_embedding_s"] / pages
        commits = ((float(ingest["chunks"]), commit / ingest["chunks"]),)
        sources |= dict.fromkeys(("prepare", "embed", "commit"), "ingest_speed.json")
    if cuda is not None:
        rates = [one["compute_tokens_per_s"] for one in cuda["chunk_kv"] if one["codec"] == "bf16"]
        kv_rate, embed_gpu = rates[0], cuda["embed_tokens_per_s"]
        sources |= {"kv": "stage_costs_cuda.json", "embed": "stage_costs_cuda.json"}
    else:
        (prefill,) = (one for one in needed("prefill_decode_gpu")["prefill"] if one["tokens"] == 4096)
        kv_rate, embed_gpu = prefill["tokens_per_s"], None
        sources |= {"kv": "prefill_decode_gpu.json"}
    (index,) = (one for one in needed("faiss_gpu")["table"] if one["index"] == "IVF 4000/4, CPU")
    return Costs(
        tokens=sizes["tokens"] / pages,
        chunks=sizes["chunks"] / pages,
        prepare_core_s=prepare,
        embed_core_s=embed,
        embed_gpu_tokens_per_s=embed_gpu,
        commit_s_per_chunk=commits,
        message_bytes=sizes["message_bytes"] / pages,
        catalogue_bytes=sizes["catalogue_bytes"] / pages,
        vector_bytes=sizes["vector_bytes"] / pages,
        kv_tokens_per_s=kv_rate,
        kv_bytes={name: value for name, value in sizes["kv_bytes_per_token"].items() if name in ("bf16", "int4")},
        index_s_per_million=index["build s"],
        sources=sources,
    )


def costs_table(costs: Costs) -> str:
    """Return the measured costs of a page with the files that they are from."""
    per_chunk = costs.commit_s_per_chunk[-1]
    rows = [
        ("tokens; chunks", f"{costs.tokens:.0f}; {costs.chunks:.2f}", "sizes"),
        ("reading and chunking, one core", f"{1e3 * costs.prepare_core_s:.1f} ms", "prepare"),
        ("embedding, one core", f"{1e3 * costs.embed_core_s:.0f} ms", costs.sources["prepare"]),
    ]
    if costs.embed_gpu_tokens_per_s:
        rows.append(("embedding, one GPU", f"{1e3 * costs.tokens / costs.embed_gpu_tokens_per_s:.2f} ms", "embed"))
    rows += [
        ("chunk KV of the 8B shape, one GPU", f"{1e3 * costs.tokens / costs.kv_tokens_per_s:.1f} ms", "kv"),
        (f"committing, at {per_chunk[0]:,.0f} chunks", f"{1e3 * per_chunk[1] * costs.chunks:.2f} ms", "commit"),
        ("sent to the committer: text, chunks, vectors", f"{costs.message_bytes / 1e3:.1f} kB", "sizes"),
        (
            "sending it, 10 Gbit/s; of it the vectors",
            f"{1e6 * costs.message_bytes / WIRE_BYTES_PER_S:.1f}; "
            f"{1e6 * costs.vector_bytes / WIRE_BYTES_PER_S:.1f} µs (calculated)",
            "sizes",
        ),
        ("catalogue: text, chunks, full-text index", f"{costs.catalogue_bytes / 1e3:.1f} kB", "sizes"),
        ("vectors", f"{costs.vector_bytes / 1e3:.1f} kB", "sizes"),
        *(
            (f"chunk KV of the 8B shape, {name}", f"{costs.tokens * value / 1e6:.1f} MB", "sizes")
            for name, value in costs.kv_bytes.items()
        ),
    ]
    table = [
        {"what": what, "cost": cost, "from": f"`{costs.sources.get(source, source)}`"} for what, cost, source in rows
    ]
    return markdown_table(table, {"what": "A page takes", "cost": "", "from": "Raw result"})


def rows_of(costs: Costs) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of pages and GPUs."""
    for pages in PAGES:
        for gpus in GPUS:
            cores, chunks = gpus * CORES_A_GPU, pages * costs.chunks
            if costs.embed_gpu_tokens_per_s:
                embed_s = pages * costs.tokens / (gpus * costs.embed_gpu_tokens_per_s)
                workers = max(pages * costs.prepare_core_s / cores, embed_s)
            else:
                workers = pages * (costs.prepare_core_s + costs.embed_core_s) / cores
            committer = max(costs.commit_s(chunks), pages * costs.message_bytes / WIRE_BYTES_PER_S)
            vectors = pages * costs.vector_bytes
            index = costs.index_s_per_million * (chunks / 1e6) ** 1.5
            times = {"workers": workers, "committer": committer, "index": index}
            limits = [max(times, key=lambda name: times[name])]
            if vectors > MEMORY_BYTES:
                limits.append("memory of the index")
            kv = pages * costs.tokens
            yield {
                "pages": f"{pages:,}",
                "gpus": gpus,
                "workers": duration(workers),
                "committer": duration(committer),
                "index": duration(index),
                "stored": size(pages * costs.catalogue_bytes + vectors),
                "kv_time": duration(kv / (gpus * costs.kv_tokens_per_s)),
                "kv_bf16": size(kv * costs.kv_bytes["bf16"]),
                "kv_int4": size(kv * costs.kv_bytes["int4"]),
                "kv_rate": size(gpus * costs.kv_tokens_per_s * costs.kv_bytes["int4"]) + "/s",
                "limit": ", ".join(limits),
            }


def duration(seconds: float) -> str:
    """Return seconds in the unit that reads best."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:.3g} s"


def size(nbytes: float) -> str:
    """Return bytes in the unit that reads best."""
    for unit, length in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if nbytes >= length:
            return f"{nbytes / length:,.3g} {unit}"
    return f"{nbytes / 1e6:.3g} MB"


def ray_table() -> list[str]:
    """Return what Ray took against the local executor, where it was measured."""
    result = result_of("ray_ingest")
    if result is None:
        return []
    rows = [{**run, "net_s": run["seconds"] - run["start_s"]} for run in result["runs"]]
    columns = {
        "executor": "Executor",
        "chunks": "Chunks",
        "tokens": "Tokens",
        "seconds": "Seconds",
        "start_s": "until the first worker",
        "net_s": "without",
    }
    same = all(one["same_bytes"] for one in result["comparison"])
    difference = max(one["vector_difference"] for one in result["comparison"])
    limits = result["limits"]
    verdict = (
        f"Ray's overhead without start-up: {result['overhead_percent']:.1f}% (at most "
        f"{limits['overhead_percent']:.0f}%). Same documents, chunks, spans, texts and token counts in both stores: "
        f"{'yes' if same else 'no'}. Largest difference of a vector's number: {difference:.1e} (at most "
        f"{limits['vector_difference']:.0e})."
    )
    command = "`python benchmarks/ray_ingest.py`, raw result `ray_ingest.json`:"
    return [command, markdown_table(rows, columns), verdict]


def tables() -> str:
    """Return everything between the marks of the page."""
    costs = read_costs()
    columns = {
        "pages": "Pages",
        "gpus": "GPUs",
        "workers": "Workers: read, chunk, embed",
        "committer": "Committer",
        "index": "Index, once",
        "stored": "Catalogue and vectors",
        "limit": "Longest",
    }
    kv_columns = {
        "pages": "Pages",
        "gpus": "GPUs",
        "kv_time": "Prefill of all chunks",
        "kv_bf16": "KV, bf16",
        "kv_int4": "KV, int4",
        "kv_rate": "written, int4",
    }
    rows = list(rows_of(costs))
    where = "on the GPUs" if costs.embed_gpu_tokens_per_s else f"on the {CORES_A_GPU} cores beside each GPU"
    parts = [
        *ray_table(),
        "Measured:",
        costs_table(costs),
        f"Calculated, embedding {where}:",
        markdown_table(rows, columns),
        "Calculated, chunk KV of every chunk at the shape of Llama 3 8B:",
        markdown_table(rows, kv_columns),
    ]
    return "\n\n".join(parts)


def written(page: str) -> str:
    """Return the page with its tables replaced."""
    before, _, rest = page.partition(START)
    _, _, behind = rest.partition(STOP)
    return f"{before}{START}\n\n{tables()}\n\n{STOP}{behind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where the page is out of date")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    if START not in page or STOP not in page:
        raise SystemExit(f"{PAGE.name} lacks the marks that the tables stand between")
    new = written(page)
    if options.check:
        raise SystemExit(0 if new == page else f"{PAGE.name} is out of date: run python benchmarks/scaling_table.py")
    Path(PAGE).write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
