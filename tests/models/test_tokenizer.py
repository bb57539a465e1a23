import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ragkit.errors import ModelError
from ragkit.models.tokenizer import ModelTokenizer
from ragkit.types import TextTokenizer

MARKUP = ["<|im_end|>", "<s>"]


def _write(folder, *, normalizer=None):
    base = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*MARKUP, *base, "Ġt", "he", "Ġthe"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")]))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKUP)
    tokenizer.add_tokens(["<tool_call>", AddedToken("    ", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding()
    tokenizer.save(str(folder / "tokenizer.json"))
    return ModelTokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("tokenizer"))


def test_it_is_a_text_tokenizer(tokenizer):
    assert isinstance(tokenizer, TextTokenizer)


def test_nothing_is_added_cut_or_padded(tokenizer):
    text = "the the the the the the the the the the"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.count_batch([text, "x"])[1] == 1


@pytest.mark.parametrize("markup", [*MARKUP, "<tool_call>"])
def test_markup_in_text_is_text(tokenizer, markup):
    token_ids = tokenizer.encode(f"a{markup}b")
    assert len(token_ids) == len(markup) + 2
    assert not set(token_ids) & {tokenizer.token_id(token) for token in (*MARKUP, "<tool_call>")}
    assert tokenizer.decode(token_ids) == f"a{markup}b"
    assert tokenizer.count_batch([f"a{markup}b"]) == [len(token_ids)]
    assert len(tokenizer.offsets(f"a{markup}b")) == len(token_ids)


def test_markup_of_the_template_is_parsed(tokenizer):
    assert tokenizer.encode_template("a<|im_end|>")[1:] == [0]
    assert tokenizer.control_ids == {0, 1}


def test_added_runs_of_spaces_stay_tokens(tokenizer):
    token_ids = tokenizer.encode("a    b")
    assert token_ids[1] == tokenizer.token_id("    ")
    assert tokenizer.decode(token_ids) == "a    b"


def test_offsets_include_the_space_that_a_token_begins_with(tokenizer):
    assert tokenizer.offsets("x the y")[:2] == [(0, 1), (1, 5)]


def test_tokens_within_one_character_share_its_span(tokenizer):
    assert tokenizer.offsets("é!") == [(0, 1), (0, 1), (1, 2)]


def test_offsets_refer_to_the_text_before_normalisation(tmp_path):
    normalising = _write(tmp_path, normalizer=normalizers.NFC())
    text = "e\u0301!"
    assert normalising.offsets(text)[-1] == (2, 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8))
def test_counts_ids_and_offsets_agree_and_cover_the_text(tokenizer, texts):
    counts = tokenizer.count_batch(texts)
    pairs = list(tokenizer.encode_batch_with_offsets(texts))
    assert pairs == [(tokenizer.encode(text), tokenizer.offsets(text)) for text in texts]
    for text, count, batch_ids in zip(texts, counts, tokenizer.encode_batch(texts), strict=True):
        token_ids, spans = tokenizer.encode(text), tokenizer.offsets(text)
        assert count == len(token_ids) == len(spans)
        assert token_ids == batch_ids
        assert tokenizer.decode(token_ids) == text
        covered = {char for start, stop in spans for char in range(start, stop)}
        assert covered == set(range(len(text)))
        assert spans == sorted(spans)


def test_many_texts_are_counted_in_bounded_batches(tokenizer, monkeypatch):
    monkeypatch.setattr("ragkit.models.tokenizer._BATCH_CHARACTERS", 10)
    assert tokenizer.count_batch(["abc"] * 9 + ["", "x" * 30]) == [3] * 9 + [0, 30]


def test_lone_surrogates_are_refused_with_their_place(tokenizer):
    with pytest.raises(ModelError, match=r"lone surrogate '\\ud800' at character 2"):
        tokenizer.encode("ab\ud800")


def test_the_id_changes_with_the_tokenizer_alone(tmp_path, tokenizer):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    same, other = _write(tmp_path / "a"), _write(tmp_path / "b", normalizer=normalizers.NFC())
    assert same.tokenizer_id == tokenizer.tokenizer_id
    assert other.tokenizer_id != tokenizer.tokenizer_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no tokenizer.json"),
        ("{", "cannot be read"),
        ("{}", "has no model"),
        ('{"model": {"type": "odd"}}', "cannot be loaded"),
    ],
)
def test_a_missing_or_damaged_file_is_an_error(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        ModelTokenizer(tmp_path)


def test_tokenising_needs_neither_torch_nor_transformers(tokenizer):
    script = (
        "import sys, pathlib; from ragkit.models.tokenizer import ModelTokenizer; from ragkit.models import resolve;"
        f"ModelTokenizer(pathlib.Path({str(tokenizer.folder)!r})).encode('x');"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def _changed(folder, change):
    """Return the tokenizer of `_write` with another file."""
    _write(folder)
    file = folder / "tokenizer.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    change(raw)
    file.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return ModelTokenizer(folder)


def _add(raw):
    index = 1 + max(token["id"] for token in raw["added_tokens"])
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": index, "content": "<|more|>"})


def _list_added_tokens_in_the_model(raw):
    raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}


def _swap(raw):
    vocab = raw["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _rename(raw):
    raw["added_tokens"][-1]["content"] = "<|other|>"


def _shorten(raw):
    raw["added_tokens"] = []
    raw["post_processor"] = None
    raw["model"]["merges"].pop()
    vocab = raw["model"]["vocab"]
    del vocab[max(vocab, key=vocab.get)]


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        (lambda raw: None, True),
        (_add, True),
        (_list_added_tokens_in_the_model, True),
        (_swap, False),
        (_rename, False),
        (_shorten, False),
    ],
)
def test_tokenizers_agree_where_ids_that_both_have_are_the_same_tokens(tokenizer, tmp_path, change, agrees):
    other = _changed(tmp_path, change)
    assert other.tokenizer_id != tokenizer.tokenizer_id
    assert other.agrees_with(tokenizer) == tokenizer.agrees_with(other) == agrees
    assert tokenizer.agrees_with(tokenizer)
