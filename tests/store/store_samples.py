"""Small documents with known vectors, and the whole content of a store as plain data to compare."""

import hashlib
import zlib

import numpy as np

from ragkit.store import IndexedDocument, KnownDocument, KVEntry, SourceFailure, SourceUpdate
from ragkit.types import Chunk, Document, chunk_id_of

DIM = 8


def vector_of(text, salt="", dim=DIM):
    """A vector that only depends on the text, so that any mix-up of rows shows."""
    seed = int.from_bytes(hashlib.sha256((salt + text).encode("utf-8", "surrogatepass")).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def embed(salt="", dim=DIM):
    return lambda documents: np.stack(
        [vector_of(text[start:stop], salt, dim) for text, spans in documents for start, stop in spans]
    )


def indexed(text, uri, metadata=None, *, step=24, overlap=0, pages=(), salt="", dim=DIM):
    document = Document.from_text(text, uri, pages, metadata)
    chunks = []
    for index, start in enumerate(range(0, len(text), step)):
        low, high = max(0, start - overlap), min(start + step, len(text))
        chunk_id = chunk_id_of(document.doc_id, low, high)
        page = document.page_at(low)
        chunks.append(Chunk(chunk_id, document.doc_id, index, text[low:high], low, high, (high - low) // 4 + 1, page))
    vectors = np.zeros((0, dim), np.float32)
    if chunks:
        vectors = np.stack([vector_of(chunk.text, salt, dim) for chunk in chunks])
    return IndexedDocument(document, chunks, vectors)


def digest(*texts):
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def update(uri, *texts, metadata=None, recipe="recipe", **options):
    """One source; several texts become `uri#row=N`, as the rows of a table do."""
    names = [uri] if len(texts) == 1 else [f"{uri}#row={row}" for row in range(len(texts))]
    documents = tuple(indexed(text, name, metadata, **options) for text, name in zip(texts, names, strict=True))
    size = sum(len(text) for text in texts)
    return SourceUpdate(uri, digest(*texts), size, 1_000, "text/plain", "text", recipe, documents)


def failed(uri, code="corrupt", content="?"):
    failure = SourceFailure(code, "parse", f"{uri} is {code}")
    return SourceUpdate(uri, digest(content), 1, 2_000, "", "", "recipe", (), failure)


def known(uri, doc_id, metadata=None):
    item = KnownDocument(doc_id, uri, metadata or {})
    return SourceUpdate(uri, digest(uri), 1, 1_000, "text/plain", "text", "recipe", (item,))


def configure(writer, embedder_id="embedder@1", dim=DIM):
    writer.configure(
        embedder_id=embedder_id, dim=dim, chunker="token", chunker_fingerprint="f", tokenizer_id="tokenizer"
    )


def contents(store):
    """Everything a reader can see: status, documents, metadata, chunk texts and vectors of every source."""
    with store.snapshot():
        table = store.vectors()
        vectors = {}
        for part in table.parts:
            vectors.update(zip(part.row_ids.tolist(), part.vectors.tolist(), strict=True))
        assert sorted(vectors) == table.row_ids.tolist()
        chunk_rows = store.chunks(store.row_ids())
        by_document = {}
        for stored in chunk_rows:
            by_document.setdefault(stored.chunk.doc_id, []).append(stored)
        seen = {}
        for record in store.sources():
            documents = []
            for link in store.source_documents(record.uri):
                rows = sorted(by_document.get(link.doc_id, []), key=lambda stored: stored.chunk.index)
                texts = [(stored.chunk.text, vectors.get(stored.row_id)) for stored in rows]
                documents.append((link.uri, store.document(link.doc_id).text, dict(link.metadata), texts))
            seen[record.uri] = (record.status.value, record.content_sha256, documents)
        linked = {link.doc_id for record in store.sources() for link in store.source_documents(record.uri)}
        assert set(by_document) <= linked
        assert len(vectors) == len(chunk_rows)
        return seen


def texts_of(store):
    """The visible texts of every source."""
    return {uri: [text for _, text, _, _ in documents] for uri, (_, _, documents) in contents(store).items()}


def found_texts(store, word):
    """Texts of the chunks that full-text search finds for a word."""
    row_ids, _ = store.match(f'"{word}"', 1000)
    return sorted(stored.chunk.text for stored in store.chunks(row_ids))


def kv_key(text):
    """A key that only depends on the text, as that of chunk KV does."""
    return hashlib.sha256(text.encode()).hexdigest()


def add_kv(store, writer):
    """Store KV for every text that has none; two chunks of one text share it."""
    stored = {kv_key(one.chunk.text): one.chunk.chunk_id for one in store.chunks(store.row_ids())}
    known = store.kv_entries(list(stored))
    entries, parts = [], []
    for key, chunk_id in stored.items():
        if key not in known:
            content = key.encode()
            entries.append(KVEntry(key, chunk_id, 64 * len(entries), 64, zlib.crc32(content)))
            parts.append(content)
    if entries:
        writer.add_kv(parts, entries)


def kv_texts(store):
    """The texts that have KV; each entry must belong to a chunk that is there and has its text."""
    entries = [entry for _, entry in store.kv_listing()]
    chunks = store.chunks_by_id([entry.chunk_id for entry in entries])
    assert [kv_key(one.chunk.text) for one in chunks] == [entry.key for entry in entries]
    return sorted(one.chunk.text for one in chunks)
