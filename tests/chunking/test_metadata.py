from dataclasses import replace

from ragkit.chunking.metadata import structural_metadata, with_metadata
from ragkit.chunking.recursive import recursive_chunker
from ragkit.chunking.structural import structural_chunker
from ragkit.config import ChunkingConfig
from ragkit.types import Document

GUIDE = "# Guide\n\nIntroduction.\n\n## Install\n\nRun the installer. Wait.\n\n## Use\n\nStart it.\n"
TABLE = "| name | size |\n|---|---|\n" + "".join(f"| item{n} | {n} metres |\n" for n in range(20))


def test_chunks_of_any_chunker_know_their_headings(word_tokenizer):
    document = Document.from_text(GUIDE, uri="guide.md")
    plain = recursive_chunker(ChunkingConfig(max_tokens=12), word_tokenizer).chunk(document)
    found = with_metadata(document, plain)
    assert [chunk.metadata.get("heading_path") for chunk in found] == ["Guide", *["Guide > Install"] * 2, "Guide > Use"]
    assert [replace(chunk, metadata={}) for chunk in found] == plain


def test_the_structural_chunker_describes_its_own_chunks(word_tokenizer):
    document = Document.from_text(GUIDE + "\n" + TABLE)
    found = structural_chunker(ChunkingConfig(max_tokens=50), word_tokenizer).chunk(document)
    assert found[0].metadata == {"heading_path": "Guide"}
    assert found[1].metadata == {"heading_path": "Guide > Install"}
    assert found[-1].metadata == {"heading_path": "Guide > Use", "table_header": "name | size"}
    assert with_metadata(document, found) == found


def test_text_without_structure_has_no_metadata():
    assert structural_metadata("Plain text. More.", [0, 12]) == [{}, {}]


def test_comments_of_code_are_no_headings(word_tokenizer):
    text = "# Author: nobody\n\nx = 1\n"
    chunker = recursive_chunker(ChunkingConfig(), word_tokenizer)
    for uri, expected in (("a.py", {}), ("a.md", {"heading_path": "Author: nobody"})):
        document = Document.from_text(text, uri=uri)
        assert with_metadata(document, chunker.chunk(document))[0].metadata == expected


def test_endless_headings_and_table_headers_are_shortened():
    text = "# " + "long " * 10_000 + "\n\ntext\n\n" + "| a " * 10_000 + "|\n|---|\n| row |\n"
    path, header = structural_metadata(text, [text.index("text"), text.index("| row")])
    assert len(str(path["heading_path"])) <= 120
    assert str(path["heading_path"]).endswith("long…")
    assert len(str(header["table_header"])) == 1000
