"""Inverted lists: recall that is measured, ids that never come back, files that are not trusted."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from filled_store import unit_vectors

from ragkit.errors import MissingExtraError, RetrievalError, StoreCorruptError
from ragkit.retrieval.faiss_flat import FaissFlatIndex
from ragkit.retrieval.faiss_runtime import import_faiss, read_index
from ragkit.retrieval.flat import FlatIndex
from ragkit.retrieval.ivf_index import IvfIndex, bring_up_to_date, stored_row_ids
from ragkit.retrieval.ivf_training import train_ivf

faiss = pytest.importorskip("faiss")

ROWS, DIM = 4000, 16
VECTORS = unit_vectors(ROWS, DIM)
ROW_IDS = np.arange(ROWS, dtype=np.int64) * 3 + 11
QUERIES = unit_vectors(50, DIM, seed=1)


def exact_over(row_ids: np.ndarray) -> FlatIndex:
    return FlatIndex(row_ids, [VECTORS[(row_ids - 11) // 3]])


def trained() -> tuple[object, int]:
    index, facts = train_ivf(ROW_IDS, exact_over(ROW_IDS), DIM)
    return index, facts.nprobe


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, truth, strict=True)]))


def test_training_reports_a_recall_that_other_queries_confirm() -> None:
    index, facts = train_ivf(ROW_IDS, exact_over(ROW_IDS), DIM)
    assert 0.95 <= facts.recall <= 1
    assert facts.nlist == min(round(4 * ROWS**0.5), (ROWS - 256) // 39)
    assert 1 <= facts.nprobe < facts.nlist
    found = IvfIndex(index, exact_over(ROW_IDS), facts.nprobe).search(QUERIES, 10)[1]
    assert recall(found, exact_over(ROW_IDS).search(QUERIES, 10)[1]) >= 0.9


def test_reading_every_list_is_exact() -> None:
    index, _ = trained()
    scores, row_ids = IvfIndex(index, exact_over(ROW_IDS), index.nlist).search(QUERIES, 10)
    expected = exact_over(ROW_IDS).search(QUERIES, 10)
    assert np.array_equal(row_ids, expected[1])
    assert np.allclose(scores, expected[0], atol=1e-5)


def test_equal_inputs_give_equal_indexes() -> None:
    (one, _), (other, _) = trained(), trained()
    assert np.array_equal(faiss.serialize_index(one), faiss.serialize_index(other))


def test_deleted_rows_are_never_found_after_two_removals_and_new_ones_are() -> None:
    index, nprobe = trained()
    kept = ROW_IDS
    for step in (0, 1):
        kept = kept[np.random.default_rng(step).random(len(kept)) > 0.2]
        assert bring_up_to_date(index, kept, exact_over(kept)) > 500
    found = IvfIndex(index, exact_over(kept), nprobe).search(QUERIES, 20)[1]
    assert np.isin(found, kept).all()
    assert bring_up_to_date(index, ROW_IDS, exact_over(ROW_IDS)) == ROWS - len(kept)
    assert np.array_equal(stored_row_ids(index), ROW_IDS)
    back = IvfIndex(index, exact_over(ROW_IDS), nprobe).search(VECTORS[::400], 1)[1][:, 0]
    assert np.array_equal(back, ROW_IDS[::400])


def test_rows_that_are_there_already_are_not_added_twice() -> None:
    index, _ = trained()
    assert bring_up_to_date(index, ROW_IDS, exact_over(ROW_IDS)) == 0
    assert index.ntotal == ROWS


@pytest.mark.parametrize("limit", [50_000, 10])  # exactly over the allowed rows, and through the lists
def test_filters_hold_and_fill_the_list_of_hits(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("ragkit.retrieval.ivf_index.EXACT_FILTER_ROWS", limit)
    index, _ = trained()
    allowed = ROW_IDS[::97]
    found = IvfIndex(index, exact_over(ROW_IDS), 1).search(QUERIES, 30, allowed)[1]
    assert found.shape == (50, 30)
    assert np.isin(found, allowed).all()


def test_an_index_of_other_rows_is_refused() -> None:
    index, nprobe = trained()
    with pytest.raises(RetrievalError, match="the index holds 4000 rows, the store 3999"):
        IvfIndex(index, exact_over(ROW_IDS[1:]), nprobe)


def test_too_few_rows_to_train_on_are_an_error() -> None:
    few = ROW_IDS[:5]
    with pytest.raises(RetrievalError, match="5 rows are too few"):
        train_ivf(few, exact_over(few), DIM)


def test_a_damaged_file_is_an_error_of_the_store(tmp_path: Path) -> None:
    index, _ = trained()
    path = tmp_path / "1.faiss"
    faiss.write_index(index, str(path))
    assert read_index(path).ntotal == ROWS
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"\xff" * 64 + content[64:]):
        path.write_bytes(broken)
        with pytest.raises(StoreCorruptError, match=r"1\.faiss cannot be read"):
            read_index(path)


def test_faiss_flat_finds_what_the_numpy_twin_finds() -> None:
    ours = FaissFlatIndex(ROW_IDS, [VECTORS[:1500], VECTORS[1500:]], DIM).search(QUERIES, 10)
    expected = exact_over(ROW_IDS).search(QUERIES, 10)
    assert np.array_equal(ours[1], expected[1])
    assert np.allclose(ours[0], expected[0], atol=1e-5)


@pytest.mark.parametrize(("device", "extra"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_a_missing_faiss_names_the_extra(monkeypatch: pytest.MonkeyPatch, device: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=rf"install ragkit\[{extra}\]"):
        import_faiss(device)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this FAISS runs on GPUs")
def test_a_faiss_without_gpu_names_the_gpu_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"install ragkit\[gpu\] in place of ragkit\[cpu\]"):
        import_faiss("cuda")


@pytest.mark.gpu
def test_a_gpu_copy_finds_what_the_cpu_index_finds() -> None:
    index, nprobe = trained()
    on_cpu = IvfIndex(index, exact_over(ROW_IDS), nprobe).search(QUERIES, 10)[1]
    assert np.array_equal(IvfIndex(index, exact_over(ROW_IDS), nprobe, "cuda").search(QUERIES, 10)[1], on_cpu)
    flat = FaissFlatIndex(ROW_IDS, [VECTORS], DIM, "cuda").search(QUERIES, 10)[1]
    assert np.array_equal(flat, exact_over(ROW_IDS).search(QUERIES, 10)[1])
