"""Fault 13: random sequences of edits, renames, failures and removals against a model made of dictionaries."""

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from store_samples import configure, embed, failed, indexed, known, update, vector_of

from ragkit.store import Store
from ragkit.types import Document, chunk_id_of

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
URIS = st.sampled_from(["a.txt", "b.txt", "c.md", "d.jsonl", "weird \udcff name?#"])
WORDS = st.sampled_from(["fox", "dog", "naïve", "東京", "\ud800", "\0", "e\u0301", "\U0001f680", "OR", '"', "x" * 40])
TEXTS = st.lists(WORDS, min_size=0, max_size=12).map(" ".join)
DOCUMENTS = st.lists(TEXTS, min_size=1, max_size=3)


class StoreMachine(RuleBasedStateMachine):
    """The model: for each URI its texts (or None where nothing was ever read) and whether the last look failed."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ragkit-model-", dir=MEMORY))
        self.store = Store.create(self.folder)
        self.texts, self.failed = {}, set()
        self.salt, self.dim = "", 8
        self.used_rows, self.generation = set(), 0

    @initialize()
    def begin(self):
        with self.store.writer() as writer:
            configure(writer)

    def write(self, *updates):
        with self.store.writer() as writer:
            writer.commit(list(updates))

    def update(self, uri, texts, metadata=None):
        return update(uri, *texts, metadata=metadata, salt=self.salt, dim=self.dim)

    @rule(uri=URIS, texts=DOCUMENTS)
    def ingest(self, uri, texts):
        self.write(self.update(uri, texts))
        self.texts[uri] = texts
        self.failed.discard(uri)

    @rule(group=st.dictionaries(URIS, DOCUMENTS, min_size=2))
    def ingest_group(self, group):
        self.write(*[self.update(uri, texts, {"n": len(texts)}) for uri, texts in group.items()])
        self.texts.update(group)
        self.failed -= group.keys()

    @rule(uri=URIS)
    def fail(self, uri):
        self.write(failed(uri))
        self.texts.setdefault(uri, [])
        self.failed.add(uri)

    @precondition(lambda self: any(self.texts.values()))
    @rule(data=st.data(), uri=URIS)
    def link_known(self, data, uri):
        text = data.draw(st.sampled_from([texts[0] for texts in self.texts.values() if texts]))
        self.write(known(uri, Document.from_text(text).doc_id))
        self.texts[uri] = [text]
        self.failed.discard(uri)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), new=URIS)
    def rename(self, data, new):
        old = data.draw(st.sampled_from(sorted(self.texts)))
        if new not in self.texts:
            with self.store.writer() as writer:
                writer.relink(old, new, size=1, mtime_ns=1)
            self.texts[new] = self.texts.pop(old)
            if old in self.failed:
                self.failed = self.failed - {old} | {new}

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), erase=st.booleans())
    def remove(self, data, erase):
        uris = data.draw(st.lists(st.sampled_from(sorted(self.texts)), min_size=1, max_size=2, unique=True))
        with self.store.writer() as writer:
            writer.remove(uris, erase=erase)
        for uri in uris:
            del self.texts[uri]
            self.failed.discard(uri)

    @rule(dim=st.sampled_from([4, 8]))
    def embed_anew(self, dim):
        self.salt, self.dim = f"salt{dim}", dim
        with self.store.writer() as writer:
            writer.reset_embeddings(embedder_id=f"other@{dim}", dim=dim, embed=embed(self.salt, dim), batch_rows=3)

    @rule()
    def collect(self):
        assert self.store.gc().pending_files == 0

    @rule()
    def reopen(self):
        self.store.close()
        self.store = Store.open(self.folder)

    @invariant()
    def the_store_holds_what_the_model_holds(self):
        store = self.store
        with store.snapshot() as generation:
            assert generation >= self.generation
            self.generation = generation
            records = store.sources()
            assert {record.uri for record in records} == self.texts.keys()
            assert {record.uri for record in records if record.status == "failed"} == self.failed
            for record in records:
                documents = [store.document(link.doc_id) for link in store.source_documents(record.uri)]
                assert [document.text for document in documents] == self.texts[record.uri]
            self.check_chunks({text for texts in self.texts.values() for text in texts})

    def check_chunks(self, texts):
        expected = {}
        for text in texts:
            for chunk in indexed(text, "x").chunks:
                expected[chunk.chunk_id] = chunk.text
        rows = self.store.chunks(self.store.row_ids())
        assert {stored.chunk.chunk_id: stored.chunk.text for stored in rows} == expected
        assert all(
            stored.chunk.chunk_id == chunk_id_of(stored.chunk.doc_id, stored.chunk.char_start, stored.chunk.char_stop)
            for stored in rows
        )
        vectors = {}
        for part in self.store.vectors().parts:
            vectors.update(zip(part.row_ids.tolist(), part.vectors.tolist(), strict=True))
        assert vectors == {stored.row_id: vector_of(stored.chunk.text, self.salt, self.dim).tolist() for stored in rows}
        new = {stored.row_id for stored in rows} - self.used_rows
        assert not new or min(new) > max(self.used_rows, default=0)
        self.used_rows |= new
        found = set(self.store.match('"fox"', 1000)[0].tolist())
        assert found == {stored.row_id for stored in rows if "fox" in stored.chunk.text.split()}

    def teardown(self):
        problems = self.store.verify().problems
        self.store.close()
        shutil.rmtree(self.folder)
        assert problems == ()


TestStoreAgainstModel = StoreMachine.TestCase
TestStoreAgainstModel.settings = settings(
    max_examples=12, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
