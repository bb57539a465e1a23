"""Code is cut between definitions, with what stands above them."""

from __future__ import annotations

import sys

import pytest

from ragkit.chunking.base import check_chunks
from ragkit.chunking.code import CodeOptions, code_chunker, recognise_language
from ragkit.config import ChunkingConfig
from ragkit.errors import MissingExtraError, UsageError
from ragkit.types import Document

PYTHON = '''"""Module."""

import os


@decorated
def first(a, b):
    """Doc."""
    if a:
        for item in b:
            print(item, a, b)

    return a + b


# A comment that belongs
# to the second.
def second():
    value = os.getcwd()
    return value


class Third:
    def method(self):
        return 1
'''
RUST = """use std::fmt;

/// A point.
#[derive(Debug)]
pub struct Point { x: i32, y: i32 }

impl Point {
    pub fn new(x: i32, y: i32) -> Self {
        Self { x, y }
    }
}
"""
GO = 'package main\n\nimport "fmt"\n\nfunc main() {\n\tx := 1\n\tfmt.Println(x)\n}\n'
JAVA = "package a.b;\n\npublic class C {\n    private int x;\n    public int get() { return this.x; }\n}\n"


def chunks(tokenizer, text, cap, language=None):
    document = Document.from_text(text)
    found = code_chunker(ChunkingConfig(max_tokens=cap), tokenizer, CodeOptions(language)).chunk(document)
    check_chunks(document, found, cap)
    return [chunk.text for chunk in found]


def test_definitions_are_kept_whole_with_decorators_and_comments(word_tokenizer):
    firsts = [piece.lstrip("\n").split("\n")[0] for piece in chunks(word_tokenizer, PYTHON, 60)]
    assert firsts[0] == '"""Module."""'
    assert set(firsts[1:]) <= {"@decorated", "# A comment that belongs", "class Third:"}
    assert len(firsts) > 1


def test_rust_attributes_and_doc_comments_stay_with_their_item(word_tokenizer):
    for cap in range(32, 60, 4):
        for piece in chunks(word_tokenizer, RUST, cap, "rust"):
            assert not piece.startswith(("#[derive", "pub struct"))


@pytest.mark.parametrize(
    ("text", "language"), [(PYTHON, "python"), (RUST, "rust"), (GO, "go"), (JAVA, "java")], ids=lambda value: value[:6]
)
def test_the_language_is_recognised(text, language):
    assert recognise_language(text) == language


@pytest.mark.parametrize(
    "text", ["", "   \n", "The cat sat on the mat. It was flat, and that was that; or so they said.\n" * 3]
)
def test_prose_is_no_code(text):
    assert recognise_language(text) is None


def test_prose_is_cut_by_its_structure(word_tokenizer):
    text = "# One\n\nThe cat sat on the mat. It was flat.\n\n# Two\n\nThe dog did not sit; it stood there.\n"
    assert [piece.split("\n")[0] for piece in chunks(word_tokenizer, text, 256)] == ["# One", "# Two"]


def test_characters_of_many_bytes_do_not_move_the_cuts(word_tokenizer):
    text = PYTHON.replace("Doc.", "Ünïcödé 字字字 \U0001f600")
    firsts = [piece.lstrip("\n").split("\n")[0] for piece in chunks(word_tokenizer, text, 60, "python")]
    assert set(firsts[1:]) <= {"@decorated", "# A comment that belongs", "class Third:"}


def test_a_missing_grammar_names_the_extra(word_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    with pytest.raises(MissingExtraError, match=r"needs the package tree-sitter, .* pip install 'ragkit\[code\]'"):
        code_chunker(ChunkingConfig(), word_tokenizer)


def test_an_unknown_language_is_refused():
    with pytest.raises(UsageError, match="no grammar for the language 'cobol'; there are c, cpp"):
        CodeOptions("cobol")
