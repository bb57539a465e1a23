"""One store's life in thirteen steps, run until done: what is done already is recognised and skipped.

`python store_scenario.py FOLDER` runs it in a process of its own, for tests that kill it.
"""

import sys
from pathlib import Path

from store_samples import add_kv, configure, embed, failed, update

from ragkit.store import Store

SECRET = "xyzzyplugh"


def steps(store, writer):
    """Every step as (generation after it, what to do); generation 0 marks steps that change nothing visible."""
    from ragkit.store.cleaning import collect  # noqa: F401 - loaded before a fault is armed

    many = [update(f"{n}.txt", f"document {n} about foxes and dogs") for n in range(3)]
    table = update("t.jsonl", "first row of it", f"second row with {SECRET}", "document 1 about foxes and dogs")
    return [
        (1, lambda: configure(writer)),
        (2, lambda: writer.commit(many)),
        (3, lambda: writer.commit([table, failed("bad.pdf")])),
        (0, lambda: add_kv(store, writer)),
        (4, lambda: writer.commit([update("0.txt", "document 0 about foxes and something longer than before")])),
        (5, lambda: writer.commit([failed("1.txt", content="broken")])),
        (6, lambda: writer.relink("2.txt", "moved.txt", size=1, mtime_ns=1)),
        (0, lambda: set_index(store, writer)),
        (7, lambda: writer.remove(["moved.txt"])),
        (8, lambda: writer.reset_embeddings(embedder_id="new@1", dim=4, embed=embed("new", 4), batch_rows=3)),
        (9, lambda: writer.commit([update("3.txt", "third document, added late", salt="new", dim=4)])),
        (10, lambda: writer.remove(["t.jsonl"], erase=True)),
        (0, lambda: writer.collect(1.0)),
    ]


def set_index(store, writer):
    writer.set_index(
        generation=store.generation,
        row_ids=store.row_ids(),
        kind="flat",
        params={"dim": 8},
        write=lambda path: path.write_bytes(b"an index over the rows " * 10),
    )


def run(folder, after_step=lambda generation, store: None):
    """Bring the store to the end of its life; `after_step` is told the generation reached by each step."""
    with Store.open_or_create(folder) as store:
        after_step(store.generation, store)
        for number in range(13):
            with store.writer() as writer:
                generation, step = steps(store, writer)[number]
                if generation == 0 or generation > store.generation:
                    step()
            after_step(store.generation, store)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
