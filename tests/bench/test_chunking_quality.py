"""The chunking evaluation from question sets to tables and plot, with doubles for the models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from doubles import HashEmbedder, WordTokenizer
from question_folder import write_question_folder

from ragkit.bench import chunking_tables
from ragkit.bench.cached_embedder import CachedEmbedder
from ragkit.bench.chunking_plots import plot_frontier
from ragkit.bench.chunking_quality import ChunkingEvaluation, EvaluationTools
from ragkit.bench.chunking_rankings import Mode
from ragkit.bench.chunking_variants import VARIANTS, check_variants
from ragkit.bench.question_sets import PUBLIC_SETS, load_question_set
from ragkit.chunking.base import check_chunks
from ragkit.config import ChunkingConfig, LengthPriorName
from ragkit.errors import ModelError, UsageError
from ragkit.progress import Silent
from ragkit.types import Document


def no_engine():
    raise AssertionError("no chunker of this test runs a language model")


def tools(embedder: HashEmbedder | None = None) -> EvaluationTools:
    return EvaluationTools(WordTokenizer(), CachedEmbedder(embedder or HashEmbedder()), None, no_engine)


@pytest.fixture
def sets(tmp_path: Path):
    write_question_folder(tmp_path)
    return [load_question_set(name, tmp_path) for name in PUBLIC_SETS]


def test_every_run_has_a_row_and_differences_to_the_baseline(sets):
    evaluation = ChunkingEvaluation(sets, ["recursive", "semantic"], [12, 24], tools())
    evaluation.run(Silent())
    report = evaluation.report()
    assert [(row.data, row.chunker, row.cap) for row in report.rows] == [
        (data.name, chunker, cap) for data in sets for chunker in ("recursive", "semantic") for cap in (12, 24)
    ]
    for row in report.rows:
        assert all(0 <= row.scores[mode] <= 100 for mode in Mode)
        assert set(row.against_baseline) == (set() if row.chunker == "recursive" else set(Mode))
    rows = {(row.data, row.chunker, row.cap): row for row in report.rows}
    for data in sets:
        ours, plain = rows[data.name, "semantic", 12], rows[data.name, "recursive", 12]
        difference = ours.scores[Mode.BM25] - plain.scores[Mode.BM25]
        assert ours.against_baseline[Mode.BM25].mean == pytest.approx(difference)


def test_the_first_chunk_is_judged_alone_whatever_the_budget(sets):
    data = replace(sets[1], characters=1)
    evaluation = ChunkingEvaluation([data], ["recursive", "token"], [40], tools())
    evaluation.run(Silent())
    plain, other = evaluation.report().rows
    assert plain.scores[Mode.BM25] == 0  # one character holds no answer
    assert plain.first_chunk[Mode.BM25] == 100
    assert other.first_chunk_against_baseline[Mode.BM25].mean == 0


def test_a_larger_budget_never_finds_less(sets):
    evaluation = ChunkingEvaluation([replace(sets[0], characters=60)], ["recursive"], [12], tools())
    evaluation.run(Silent())
    points = evaluation.report().points
    for mode in Mode:
        recalls = [point.recall for point in points if point.mode is mode]
        assert len(recalls) == 5
        assert recalls == sorted(recalls)


def test_chroma_rows_name_the_best_run_at_their_characters(sets, monkeypatch):
    (data,) = [data for data in sets if data.name == "chunking_evaluation"]
    evaluation = ChunkingEvaluation([data], ["recursive", "token"], [12], tools())
    evaluation.run(Silent())
    assert evaluation.report().chroma == []  # a part of the questions compares with nothing
    monkeypatch.setattr(chunking_tables, "CHROMA_QUESTIONS", 1)
    rows = evaluation.report().chroma
    assert [row.name for row in rows] == [name for name, *_ in chunking_tables.CHROMA_ROWS]
    assert {row.by_recall for row in rows} <= {"recursive 12", "token 12"}
    for row in rows:
        assert 0.95 * row.characters - 1 <= row.near_iou.characters <= 1.05 * row.characters + 1
        assert row.near_iou.score >= row.our_iou
        assert row.near_recall.score >= row.our_recall
        assert row.hybrid_recall.characters == row.characters


def test_an_interrupted_evaluation_reports_what_is_done(sets):
    class Stop(Exception):
        pass

    class StopAfterTwo(Silent):
        def __init__(self) -> None:
            self.done = 0

        def advance(self, documents: int = 0, bytes: int = 0, tokens: int = 0) -> None:
            self.done += documents
            if self.done == 2:
                raise Stop

    evaluation = ChunkingEvaluation(sets, ["recursive", "token"], [12, 24], tools())
    with pytest.raises(Stop):
        evaluation.run(StopAfterTwo())
    assert [(row.chunker, row.cap) for row in evaluation.report().rows] == [("recursive", 12), ("recursive", 24)]


def test_sentences_are_embedded_once_for_all_chunkers(sets):
    embedder = HashEmbedder()
    names = ["semantic", "semantic:percentile", "semantic:gradient", "semantic:length"]
    ChunkingEvaluation(sets[1:2], names, [24], tools(embedder)).run(Silent())
    (data,) = sets[1:2]
    questions = len(names) * len(data.questions)
    texts = sum(len(document.text) for document in data.documents.values())
    assert embedder.texts_embedded - questions < texts // 10  # six sentences and the chunks made of them


def test_the_frontier_is_drawn_with_a_panel_a_set_and_two_for_chunking_evaluation(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(chunking_tables, "CHROMA_QUESTIONS", 1)
    sets = [replace(data, characters=80) for data in sets]
    evaluation = ChunkingEvaluation(sets, ["recursive", "token"], [12], tools())
    evaluation.run(Silent())
    plot_frontier(evaluation.report(), tmp_path / "frontier.svg")
    svg = (tmp_path / "frontier.svg").read_text()
    assert svg.count(">characters retrieved<") == 4
    for text in (
        "answer whole in one piece, %",
        "recall, %",
        "IoU, %",
        "bm25, best",
        "hybrid, best",
        "Chroma's report",
    ):
        assert text in svg


class _Models:
    embedder = HashEmbedder()
    engine = property(lambda self: no_engine())


# These run a language model, or a head that fits no double of the embedder.
WITH_OWN_MODEL = {"perplexity", "margin", "boundary_head", "topic"}


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.partition(":")[0] not in WITH_OWN_MODEL])
def test_every_variant_keeps_the_contract(name):
    document = Document.from_text("Frogs live in ponds. They eat flies.\n\nStars shine at night. The Sun is one.\n" * 8)
    config = ChunkingConfig(name.partition(":")[0], 24)
    check_chunks(document, VARIANTS[name](config, WordTokenizer(), _Models()).chunk(document), 24)


def test_an_unknown_chunker_names_the_nearest():
    with pytest.raises(UsageError, match="no chunker 'semantc' to compare; did you mean 'semantic'"):
        check_variants(("recursive", "semantc"))


def test_a_budget_of_ones_own_is_taken(sets):
    evaluation = ChunkingEvaluation([replace(sets[1], characters=30)], ["recursive"], [12], tools())
    evaluation.run(Silent())
    assert {row.characters for row in evaluation.report().rows} == {30}


def test_the_settings_of_the_user_are_those_that_are_compared(sets):
    def chunk_counts(config: ChunkingConfig) -> list[int]:
        evaluation = ChunkingEvaluation(
            sets[1:2], ["recursive", "recursive:gaussian"], [24], replace(tools(), config=config)
        )
        evaluation.run(Silent())
        return [row.chunks for row in evaluation.report().rows]

    plain, _ = chunk_counts(ChunkingConfig())
    ours, named = chunk_counts(ChunkingConfig(length_prior=LengthPriorName.GAUSSIAN, length_target=6))
    assert ours == named > plain
    with pytest.raises(ModelError, match="no folder of a SaT model"):
        chunk_counts(ChunkingConfig(sentence_model="gone"))
