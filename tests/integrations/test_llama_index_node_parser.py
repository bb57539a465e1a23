"""LlamaIndex nodes keep the spans of their chunks, where LlamaIndex itself would look them up wrongly."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from doubles import HashEmbedder, WordTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkit.chunking.semantic import semantic_chunker
from ragkit.chunking.structural import structural_chunker
from ragkit.chunking.token import token_chunker
from ragkit.config import ChunkingConfig
from ragkit.errors import ConfigError, MissingExtraError, UsageError

llama_index_core = pytest.importorskip("llama_index.core", reason="the extra llama-index is not installed")

from llama_index.core.ingestion import IngestionPipeline  # noqa: E402
from llama_index.core.node_parser import NodeParser  # noqa: E402
from llama_index.core.node_parser.node_utils import build_nodes_from_splits  # noqa: E402
from llama_index.core.schema import Document, MetadataMode, NodeRelationship, TextNode  # noqa: E402

from ragkit.integrations.llama_index import RagkitNodeParser  # noqa: E402

REPEATED = "yes no " * 40


def parser(cap: int = 6, overlap: int = 0, **fields) -> RagkitNodeParser:
    config = ChunkingConfig("token", max_tokens=cap, overlap_tokens=overlap)
    return RagkitNodeParser.from_chunker(token_chunker(config, WordTokenizer()), **fields)


def spans(nodes) -> list[tuple[int, int]]:
    return [(node.start_char_idx, node.end_char_idx) for node in nodes]


def test_repeated_text_keeps_its_spans():
    nodes = parser().get_nodes_from_documents([Document(text=REPEATED)])
    assert len(nodes) > 20
    assert "".join(node.text for node in nodes) == REPEATED
    assert [REPEATED[start:stop] for start, stop in spans(nodes)] == [node.text for node in nodes]
    ends = [stop for _, stop in spans(nodes)]
    assert [start for start, _ in spans(nodes)] == [0, *ends[:-1]]
    assert ends[-1] == len(REPEATED)


def test_llama_index_alone_would_move_them():
    class Plain(NodeParser):
        def _parse_nodes(self, nodes, show_progress=False, **kwargs):
            return build_nodes_from_splits([REPEATED[:14], REPEATED[14:28], REPEATED[28:]], nodes[0])

    assert spans(Plain().get_nodes_from_documents([Document(text=REPEATED)]))[1] != (14, 28)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("ab. \n#é🐸"), max_size=60), max_size=3),
    cap=st.integers(4, 12),
    overlap=st.integers(0, 3),
)
def test_spans_are_exact_on_any_text_and_with_overlap(texts, cap, overlap):
    documents = [Document(text=text) for text in texts]
    nodes = parser(cap, overlap).get_nodes_from_documents(documents)
    by_id = {document.id_: document.text for document in documents}
    for node in nodes:
        assert by_id[node.ref_doc_id][node.start_char_idx : node.end_char_idx] == node.text
    for document in documents:
        own = [span for node, span in zip(nodes, spans(nodes), strict=True) if node.ref_doc_id == document.id_]
        covered = 0
        for start, stop in own:
            assert start <= covered < stop
            covered = stop
        assert covered == len(document.text)


def test_spans_are_exact_without_waiting_too():
    nodes = asyncio.run(parser().aget_nodes_from_documents([Document(text=REPEATED)]))
    assert [REPEATED[start:stop] for start, stop in spans(nodes)] == [node.text for node in nodes]


def test_nodes_are_linked_and_inherit_metadata():
    document = Document(text="One two. Three four.", metadata={"author": "A"}, excluded_llm_metadata_keys=["author"])
    first, second, *_ = parser(cap=5).get_nodes_from_documents([document])
    assert first.relationships[NodeRelationship.SOURCE].node_id == document.id_
    assert first.relationships[NodeRelationship.NEXT].node_id == second.node_id
    assert second.relationships[NodeRelationship.PREVIOUS].node_id == first.node_id
    assert first.metadata["author"] == "A"
    assert first.metadata["ragkit_token_count"] == WordTokenizer().count_batch([first.text])[0]
    assert len(first.metadata["ragkit_chunk_id"]) == 32
    assert first.get_content(MetadataMode.EMBED) == "author: A\n\n" + first.text
    assert first.get_content(MetadataMode.LLM) == first.text


def test_heading_path_and_table_header_are_metadata_of_nodes():
    rows = "".join(f"| newt{n} | {n} |\n" for n in range(12))
    text = f"# Newts\n\n## Weights\n\n| name | grams |\n|---|---|\n{rows}"
    chunker = structural_chunker(ChunkingConfig(max_tokens=60), WordTokenizer())
    nodes = RagkitNodeParser.from_chunker(chunker).get_nodes_from_documents([Document(text=text)])
    assert nodes[-1].metadata["heading_path"] == "Newts > Weights"
    assert nodes[-1].metadata["table_header"] == "name | grams"


def test_nodes_can_be_cut_again():
    node = TextNode(text=REPEATED)
    assert [REPEATED[start:stop] for start, stop in spans(parser()([node]))] == [one.text for one in parser()([node])]


def test_an_ingestion_pipeline_runs_it():
    nodes = IngestionPipeline(transformations=[parser()]).run(documents=[Document(text=REPEATED)])
    assert [REPEATED[start:stop] for start, stop in spans(nodes)] == [node.text for node in nodes]


def test_chunkers_with_models_run_in_it():
    chunker = semantic_chunker(ChunkingConfig(max_tokens=20), WordTokenizer(), HashEmbedder())
    text = "Frogs live in ponds. They eat flies. Stars shine. The Sun is one. " * 3
    nodes = RagkitNodeParser.from_chunker(chunker).get_nodes_from_documents([Document(text=text)])
    assert "".join(node.text for node in nodes) == text


def _sent(made):
    """The parser as another process gets it: made anew from the state that it gives."""
    again = RagkitNodeParser.__new__(RagkitNodeParser)
    again.__setstate__(made.__getstate__())
    return again


def test_settings_are_serialised_and_checked():
    made = RagkitNodeParser(chunker="sentence", max_tokens=99, include_metadata=False)
    assert made.to_dict()["class_name"] == "RagkitNodeParser"
    stored = {
        key: value for key, value in made.to_dict().items() if key != "id_func"
    }  # LlamaIndex writes it unreadably
    for again in (RagkitNodeParser.from_dict(stored), _sent(made)):
        assert (again.chunker, again.max_tokens, again.include_metadata) == ("sentence", 99, False)
    with pytest.raises(ConfigError, match="max_tokens must be a whole number >= 1, got 0"):
        RagkitNodeParser(max_tokens=0)
    with pytest.raises(UsageError, match="device must be one of auto, cpu, cuda, got 'tpu'"):
        RagkitNodeParser(device="tpu")


def test_a_parser_around_a_chunker_refuses_to_be_pickled():
    with pytest.raises(UsageError, match=r"made from a chunker object \(token\) cannot be sent"):
        _sent(parser())


def test_giving_its_state_changes_nothing_that_other_threads_see():
    made, seen = RagkitNodeParser(), []

    class Watching:
        def __call__(self, number, document):
            return str(number)

        def __reduce__(self):
            seen.append(made._made)
            raise TypeError("cannot be sent")

    made.id_func = watching = Watching()
    made._made = chunker = token_chunker(ChunkingConfig(max_tokens=20), WordTokenizer())
    state = made.__getstate__()
    assert seen == [chunker]
    assert state["__pydantic_private__"]["_made"] is None
    assert (made._made, made.id_func) == (chunker, watching)


@pytest.mark.models
def test_the_named_chunker_is_made_with_the_bundled_tokenizer_on_first_use():
    made = RagkitNodeParser(chunker="sentence", max_tokens=16, offline=True)
    nodes = made.get_nodes_from_documents([Document(text=REPEATED)])
    assert max(node.metadata["ragkit_token_count"] for node in nodes) <= 16
    again = _sent(made)
    assert spans(again.get_nodes_from_documents([Document(text=REPEATED)])) == spans(nodes)


def test_without_llama_index_the_extra_is_named():
    code = "import sys; sys.modules['llama_index'] = None\nimport ragkit.integrations.llama_index"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{MissingExtraError.__module__}.MissingExtraError: the LlamaIndex integration needs")
    assert last.endswith("pip install 'ragkit[llama-index]'")
