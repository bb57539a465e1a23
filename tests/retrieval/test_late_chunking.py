"""Late chunking: the vector of a chunk is the mean of its tokens in the encoded document."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doubles import HashEmbedder, WordTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit import Pipeline
from ragkit.config import ChunkingConfig, EmbeddingConfig, PipelineConfig
from ragkit.errors import ConfigError, EmbedderMismatchError, ModelError, RetrievalError, UsageError
from ragkit.retrieval import late_chunking
from ragkit.retrieval.chunk_vectors import SeparateChunks, chunk_embedder, question_embedder_id
from ragkit.retrieval.encoder import BertEncoder
from ragkit.retrieval.late_chunking import LateChunks
from ragkit.retrieval.model_folder import read_model_folder
from ragkit.retrieval.sentence_transformer import SentenceTransformerEmbedder
from ragkit.retrieval.windows import overlapping_windows
from ragkit.store.base import DocumentSpans

WINDOW = 16
SHORT = "the cat sat. a dog ran"  # 7 tokens and two special ones


def encoder(folder: Path, batch_tokens: int = 8192) -> BertEncoder:
    return BertEncoder(read_model_folder(folder), batch_tokens=batch_tokens)


def late(embedder: BertEncoder | SentenceTransformerEmbedder, overlap: float = 0.25) -> LateChunks:
    return LateChunks(embedder, WINDOW, overlap, "+")


def spans_of(text: str, *cuts: int) -> list[tuple[int, int]]:
    return list(zip([0, *cuts], [*cuts, len(text)], strict=True))


def long_text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(["the", "cat", "sat", "mat", "dog", "ran", "far"], k=words))


def expected_by_hand(embedder: BertEncoder, document: DocumentSpans, overlap: int) -> np.ndarray:
    """Every token's state from its own window, one window a forward, chunks averaged in float64."""
    before, behind = (list(ids) for ids in embedder.special_ids)
    ids = embedder.token_ids([document.text])[0]
    offsets = [start for start, _ in embedder._tokenizer.encode(document.text, add_special_tokens=False).offsets]
    rows = []
    for window in overlapping_windows(len(ids), WINDOW - 2, overlap):
        tokens = np.array([*before, *ids[window.start : window.stop], *behind])
        states = embedder.token_states([tokens]).double().numpy()
        rows += [states[0]] if window.start == 0 else []
        rows += list(states[1:-1][window.own_start - window.start : window.own_stop - window.start])
    rows.append(states[-1])
    vectors = []
    for number, (start, stop) in enumerate(document.spans):
        own = [row for row, at in zip(rows[1:-1], offsets, strict=True) if start <= at < stop]
        own += [rows[0]] if number == 0 else []
        own += [rows[-1]] if number == len(document.spans) - 1 else []
        vectors.append(np.mean(own, axis=0))
    return np.array([vector / np.linalg.norm(vector) for vector in vectors])


@pytest.mark.parametrize("pooling", ["mean", "mean_sqrt_len_tokens"])
def test_a_short_document_that_is_one_chunk_has_its_ordinary_vector(variant: Callable[..., Path], pooling: str) -> None:
    prompted = variant(pooling=pooling, config_sentence_transformers={"prompts": {"document": "the mat "}})
    for embedder in (encoder(prompted), SentenceTransformerEmbedder(read_model_folder(prompted))):
        got = late(embedder).encode_chunks([DocumentSpans(SHORT, [(0, len(SHORT))])])
        assert np.abs(got - embedder.encode([SHORT])).max() < 1e-6


def test_chunks_are_the_means_of_their_own_tokens_in_the_document(bert_folder: Path) -> None:
    embedder = encoder(bert_folder)
    document = DocumentSpans(SHORT, spans_of(SHORT, 13))
    got = late(embedder).encode_chunks([document])
    assert np.abs(got - expected_by_hand(embedder, document, 3)).max() < 1e-6
    assert np.abs(got - embedder.encode([SHORT[:13], SHORT[13:]])).max() > 1e-2


def test_a_chunk_knows_what_stands_around_it(bert_folder: Path) -> None:
    chunks = late(encoder(bert_folder))
    one, other = (
        chunks.encode_chunks([DocumentSpans(text, [(0, 8), (8, len(text))])])[1]
        for text in ("the cat sat", "a dog. . sat")
    )
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_long_documents_are_read_in_windows_and_every_token_counts_once(bert_folder: Path, overlap: float) -> None:
    embedder = encoder(bert_folder)
    text = long_text(90)
    document = DocumentSpans(text, spans_of(text, *[at + 1 for at, char in enumerate(text) if char == " "][6::7]))
    got = late(embedder, overlap).encode_chunks([document])
    assert np.abs(got - expected_by_hand(embedder, document, int(overlap * 14))).max() < 1e-6


def test_sentence_transformers_gives_the_same_chunks(bert_folder: Path) -> None:
    folder = read_model_folder(bert_folder)
    text = long_text(60)
    documents = [DocumentSpans(text, spans_of(text, 30, 95)), DocumentSpans(SHORT, spans_of(SHORT, 13))]
    thin, full = (late(one) for one in (BertEncoder(folder), SentenceTransformerEmbedder(folder)))
    assert thin.embedder_id == full.embedder_id
    assert np.abs(thin.encode_chunks(documents) - full.encode_chunks(documents)).max() < 1e-5


def test_vectors_do_not_depend_on_the_batch_or_on_how_many_states_are_held(
    bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [long_text(words, words) for words in (40, 3, 120, 1, 15)]
    documents = [DocumentSpans(text, spans_of(text, *range(11, len(text) - 1, 23))) for text in texts]
    together = late(encoder(bert_folder)).encode_chunks(documents)
    monkeypatch.setattr(late_chunking, "_HELD_TOKENS", 20)
    apart = [late(encoder(bert_folder, batch_tokens=1)).encode_chunks([document]) for document in documents]
    assert np.abs(together - np.concatenate(apart)).max() < 1e-6
    assert np.abs(together - late(encoder(bert_folder)).encode_chunks(documents)).max() < 1e-6


def test_overlapping_chunks_share_their_tokens(bert_folder: Path) -> None:
    embedder = encoder(bert_folder)
    document = DocumentSpans(SHORT, [(0, 13), (8, len(SHORT))])
    got = late(embedder).encode_chunks([document])
    assert np.abs(got - expected_by_hand(embedder, document, 3)).max() < 1e-6


def test_a_chunk_without_tokens_is_embedded_by_itself(bert_folder: Path) -> None:
    embedder = encoder(bert_folder)
    documents = [DocumentSpans("the cat  \n\n  dog", [(0, 8), (8, 12), (12, 16)]), DocumentSpans(" \n", [(0, 2)])]
    got = late(embedder).encode_chunks(documents)
    assert np.abs(got[[1, 3]] - embedder.encode([""])).max() < 1e-6
    without = late(embedder).encode_chunks([DocumentSpans("the cat  \n\n  dog", [(0, 12), (12, 16)])])
    assert np.abs(got[[0, 2]] - without).max() < 1e-6


def test_documents_without_chunks_give_no_rows(bert_folder: Path) -> None:
    chunks = late(encoder(bert_folder))
    assert chunks.encode_chunks([]).shape == (0, 32)
    assert chunks.encode_chunks([DocumentSpans("", []), DocumentSpans("cat", [(0, 3)])]).shape == (1, 32)


def test_progress_hears_every_token_of_every_window(bert_folder: Path) -> None:
    heard: list[int] = []
    text = " ".join(["cat"] * 40)
    late(encoder(bert_folder), 0.0).encode_chunks([DocumentSpans(text, [(0, len(text))])], heard.append)
    assert sum(heard) == 3 * WINDOW  # 40 tokens in 3 windows, each full: the overlap is what is left over


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="catdog .\n猫é\u200b", max_size=120), st.data())
def test_any_tiling_of_any_text_gives_finite_unit_vectors(bert_folder: Path, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=6))) if len(text) > 1 else []
    spans = spans_of(text, *cuts) if text else []
    vectors = late(encoder(bert_folder)).encode_chunks([DocumentSpans(text, spans)])
    assert vectors.shape == (len(spans), 32)
    assert not len(vectors) or np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_damaged_states_are_an_error(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = encoder(bert_folder)
    sound = embedder.token_states
    monkeypatch.setattr(embedder, "token_states", lambda *given: sound(*given) * np.nan)
    with pytest.raises(RetrievalError, match="weights are damaged"):
        late(embedder).encode_chunks([DocumentSpans(SHORT, [(0, len(SHORT))])])


def test_a_window_without_room_for_text_is_refused(bert_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"a window of 2 tokens .* holds no text"):
        LateChunks(encoder(bert_folder), 2, 0.0, "+")


def test_the_identity_holds_whatever_changes_the_vectors(bert_folder: Path) -> None:
    embedder = encoder(bert_folder)
    configs = [
        EmbeddingConfig(),
        EmbeddingConfig(late_chunking=True),
        EmbeddingConfig(late_chunking=True, window_overlap=0.25),
        EmbeddingConfig(late_chunking=True, batch_tokens=8),
    ]
    ids = [chunk_embedder(embedder, config).embedder_id for config in configs]
    assert ids[0] == embedder.embedder_id
    assert len(set(ids)) == 4
    assert {question_embedder_id(one) for one in ids} == {embedder.embedder_id}


def test_separate_chunks_are_the_default_and_embed_each_text(bert_folder: Path) -> None:
    embedder = encoder(bert_folder)
    chunks = chunk_embedder(embedder, EmbeddingConfig())
    assert isinstance(chunks, SeparateChunks)
    got = chunks.encode_chunks([DocumentSpans(SHORT, spans_of(SHORT, 13))])
    assert np.array_equal(got, embedder.encode([SHORT[:13], SHORT[13:]]))


def test_embedders_that_do_not_average_tokens_are_refused(variant: Callable[..., Path]) -> None:
    for embedder in (encoder(variant(pooling="cls")), HashEmbedder()):
        with pytest.raises(UsageError, match=r"late chunking averages token vectors.*embedding\.late_chunking off"):
            chunk_embedder(embedder, EmbeddingConfig(late_chunking=True))


@pytest.mark.parametrize("overlap", [-0.1, 0.6, float("nan")])
def test_an_impossible_overlap_is_refused(overlap: float) -> None:
    with pytest.raises(ConfigError, match=r"embedding\.window_overlap must lie in \[0, 0\.5\]"):
        EmbeddingConfig(window_overlap=overlap)


def stored_vectors(pipeline: Pipeline) -> np.ndarray:
    return np.concatenate([part.vectors for part in pipeline.store.vectors().parts])


def test_a_store_never_mixes_late_and_separate_vectors(tmp_path: Path, bert_folder: Path) -> None:
    source = tmp_path / "cats.txt"
    source.write_text(long_text(100))
    plain = PipelineConfig(chunking=ChunkingConfig(max_tokens=20))
    config = replace(plain, embedding=EmbeddingConfig(late_chunking=True))
    parts = {"embedder": encoder(bert_folder), "tokenizer": WordTokenizer()}
    with Pipeline.open(tmp_path / "store", config, **parts) as pipeline:
        assert pipeline.ingest([source]).chunks > 5
        spans = [(one.chunk.char_start, one.chunk.char_stop) for one in pipeline.store.chunks(pipeline.store.row_ids())]
        expected = pipeline.parts.chunk_embedder.encode_chunks([DocumentSpans(source.read_text(), spans)])
        assert np.abs(stored_vectors(pipeline) - expected).max() < 1e-6
        found = pipeline.search("the cat").hits
    with Pipeline.open(tmp_path / "store", plain, **parts) as pipeline:
        assert [hit.chunk_id for hit in pipeline.search("the cat").hits] == [hit.chunk_id for hit in found]
        (tmp_path / "dogs.txt").write_text("a dog ran")
        with pytest.raises(
            EmbedderMismatchError, match=r"\+late-14-7.*set embedding\.model.*embedding\.late_chunking.*--reembed"
        ):
            pipeline.ingest([tmp_path])
        pipeline.ingest([source], reembed=True)
        separate = parts["embedder"].encode([source.read_text()[start:stop] for start, stop in spans])
        assert np.abs(stored_vectors(pipeline) - separate).max() < 1e-6
    with Pipeline.open(tmp_path / "store", config, **parts) as pipeline:
        with pytest.raises(EmbedderMismatchError):
            pipeline.ingest([tmp_path])
        pipeline.ingest([source], reembed=True)
        assert np.abs(stored_vectors(pipeline) - expected).max() < 1e-6
