"""Sentences by a SaT model: its package is replaced by a double that ends a sentence at every `|`."""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
from embedding_doubles import TopicEmbedder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ragkit.chunking import sat_sentences, segmenter
from ragkit.chunking.base import check_chunks
from ragkit.chunking.registry import create_chunker
from ragkit.chunking.sat_sentences import SatSegmenter
from ragkit.config import ChunkingConfig, LengthPriorName
from ragkit.errors import ChunkingError, ConfigError, MissingExtraError, ModelError
from ragkit.types import Document


class SaT:
    """What is used of wtpsplit_lite.SaT: `|` ends a sentence with probability 0.9, `/` with 0.1."""

    made = 0
    asked: ClassVar[list[str]] = []

    def __init__(self, model_name_or_model, tokenizer_name_or_path="facebookAI/xlm-roberta-base", ort_providers=None):
        if "broken" in model_name_or_model:
            raise RuntimeError("protobuf parsing failed")
        assert tokenizer_name_or_path == model_name_or_model
        assert ort_providers == ["CPUExecutionProvider"]
        SaT.made += 1

    def predict_proba(self, text):
        SaT.asked.append(text)
        assert not any(0xD800 <= ord(char) < 0xE000 for char in text)
        if "crash" in text:
            raise AssertionError("current_chunk == num_chunks")
        values = {"|": 0.9, "/": 0.1, "N": np.nan}
        found = np.array([values.get(char, 0.01) for char in text], dtype=np.float16)
        return found[:-1] if "short" in text else found


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("wtpsplit_lite")
    module.SaT = SaT
    monkeypatch.setitem(sys.modules, "wtpsplit_lite", module)
    segmenter._sat.cache_clear()
    SaT.made, SaT.asked = 0, []


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model_optimized.onnx", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def sentences(folder, text, threshold=0.25):
    starts = SatSegmenter(folder, threshold).starts(text)
    return [text[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)]


def test_a_sentence_ends_above_the_threshold_and_keeps_the_white_space_behind_it(package, folder):
    text = "One. still one|  \n Two/ still two| Three"
    assert sentences(folder, text) == ["One. still one|  \n ", "Two/ still two| ", "Three"]
    assert len(sentences(folder, text, 0.05)) == 4


def test_a_blank_line_ends_a_sentence_whatever_the_model_says(package, folder):
    assert sentences(folder, "a title\n\nand its text") == ["a title\n\n", "and its text"]


def test_nothing_is_asked_of_text_without_letters_or_digits(package, folder):
    assert sentences(folder, "\u200b ... \n") == ["\u200b ... \n"]
    assert SatSegmenter(folder, 0.25).starts("") == []
    assert SaT.asked == []


def test_long_text_is_read_in_blocks_whose_edges_are_no_boundaries(package, folder, monkeypatch):
    monkeypatch.setattr(sat_sentences, "_BLOCK", 40)
    monkeypatch.setattr(sat_sentences, "_EDGE", 10)
    text = "word " * 30 + "end| " + "x" * 100 + "| last\nline"
    assert sentences(folder, text) == ["word " * 30 + "end| ", "x" * 100 + "| ", "last\nline"]
    assert "".join(SaT.asked) == text
    assert max(map(len, SaT.asked)) <= 40
    assert all(block.endswith(" ") for block in SaT.asked[:3])


def test_lone_surrogates_are_hidden_from_the_model_and_keep_their_place(package, folder):
    assert sentences(folder, "a\ud83d\ude00b| c\udc00d") == ["a\ud83d\ude00b| ", "c\udc00d"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crash here", "failed on 'crash here'.*num_chunks"),
        ("short of one", r"shape \(11,\) for 12 characters"),
        ("aN", r"gave 1 finite numbers in an array of shape \(2,\)"),
    ],
)
def test_a_model_that_fails_is_an_error_and_loses_no_text(package, folder, text, message):
    with pytest.raises(ChunkingError, match=message):
        SatSegmenter(folder, 0.25).starts(text)


def test_a_folder_that_is_not_complete_is_refused_by_what_is_missing(package, folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; .*tokenizer\.json that of xlm-roberta-base"):
        SatSegmenter(folder, 0.25)
    with pytest.raises(ModelError, match=r"no config\.json and no model_optimized\.onnx and no tokenizer\.json"):
        create_chunker(ChunkingConfig("sentence", sentence_model=str(folder / "nowhere")), None)


def test_a_model_that_cannot_be_loaded_is_named(package, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "model_optimized.onnx", "tokenizer.json"):
        (folder / name).write_text("")
    with pytest.raises(ModelError, match="broken cannot be loaded: protobuf parsing failed"):
        SatSegmenter(folder, 0.25)


def test_a_missing_package_is_named_with_its_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wtpsplit_lite", None)
    with pytest.raises(MissingExtraError, match=r"wtpsplit-lite.*pip install 'ragkit\[sat\]'"):
        SatSegmenter(folder, 0.25)


@pytest.mark.parametrize("threshold", [0.0, 1.0, float("nan")])
def test_an_impossible_threshold_is_refused(threshold):
    with pytest.raises(ConfigError, match=r"chunking\.sentence_threshold must lie between 0 and 1"):
        ChunkingConfig(sentence_threshold=threshold)


class Models:
    embedder = TopicEmbedder()


CHUNKERS = [
    ("sentence", LengthPriorName.AUTO),
    ("sentence", LengthPriorName.UNIFORM),
    ("semantic", LengthPriorName.AUTO),
    ("recursive", LengthPriorName.AUTO),
    ("balanced", LengthPriorName.AUTO),
]


@pytest.mark.parametrize(("name", "prior"), CHUNKERS)
def test_chunkers_cut_at_the_sentences_of_the_model(package, folder, word_tokenizer, name, prior):
    text = "One two. three four| Five six. seven| Eight nine. ten| Eleven| "
    config = ChunkingConfig(name, 10, length_prior=prior, sentence_model=str(folder))
    chunks = create_chunker(config, word_tokenizer, Models()).chunk(Document.from_text(text))
    assert len(chunks) > 1
    assert all(chunk.text.endswith("| ") for chunk in chunks)
    assert SaT.made == 1


@pytest.mark.parametrize(("name", "prior"), [*CHUNKERS, ("cluster", LengthPriorName.AUTO)])
def test_the_fingerprint_changes_with_model_and_threshold(package, folder, word_tokenizer, name, prior):
    def fingerprint(**options):
        config = ChunkingConfig(name, 50, length_prior=prior, **options)
        return create_chunker(config, word_tokenizer, Models()).fingerprint

    found = [fingerprint(), fingerprint(sentence_threshold=0.5), fingerprint(sentence_model=str(folder))]
    found.append(fingerprint(sentence_model=str(folder), sentence_threshold=0.5))
    segmenter._sat.cache_clear()
    (folder / "model_optimized.onnx").write_text("other weights")
    found.append(fingerprint(sentence_model=str(folder)))
    assert found[0] == found[1]
    assert len(set(found)) == 4


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab|/ \n.#\ud800é猫", max_size=200), cap=st.integers(5, 40), data=st.data())
def test_chunks_keep_the_contract_whatever_the_model_says(package, folder, doubles, text, cap, data):
    name, prior = data.draw(st.sampled_from(CHUNKERS))
    config = ChunkingConfig(name, cap, length_prior=prior, sentence_model=str(folder))
    document = Document.from_text(text)
    check_chunks(document, create_chunker(config, doubles["byte"](), Models()).chunk(document), cap)
