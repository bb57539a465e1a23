"""Which files are found, in which order, and what is left out."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from ragkit.errors import UsageError
from ragkit.readers import content_sha256, discover
from ragkit.readers.globs import PathFilter


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    for name in (
        "b.md", "a.txt", "sub/c.md", "sub/deep/d.md", "sub/deep/e.html", ".hidden.md", ".git/config", ".cfg/f.md",
        "node_modules/x.md", "note.md~", "~$draft.docx", "sub/__pycache__/m.pyc", "Z/last.md",
    ):  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def found(root, *args, **named):
    return [os.path.relpath(source.uri, root) for source in discover([root], *args, **named)]


def test_a_folder_is_walked_in_one_order_without_hidden_files_and_litter(tree):
    assert found(tree) == ["a.txt", "b.md", "Z/last.md", "sub/c.md", "sub/deep/d.md", "sub/deep/e.html"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.md"], [], ["b.md", "Z/last.md", "sub/c.md", "sub/deep/d.md"]),
        (["sub/*.md"], [], ["sub/c.md"]),
        (["sub/**/*.md"], [], ["sub/c.md", "sub/deep/d.md"]),
        (["**/deep/**"], [], ["sub/deep/d.md", "sub/deep/e.html"]),
        (["/a.txt", "[bc].md"], [], ["a.txt", "b.md", "sub/c.md"]),
        (["?.md"], ["sub/deep/"], ["b.md", "sub/c.md"]),
        ([], ["deep", "*.txt"], ["b.md", "Z/last.md", "sub/c.md"]),
        (["[!a-c].md"], [], ["sub/deep/d.md"]),
        ([".*"], [], [".hidden.md"]),
        ([".cfg/*"], [], [".cfg/f.md"]),
    ],
)
def test_patterns_mean_what_they_mean_in_gitignore(tree, include, exclude, expected):
    assert found(tree, include, exclude) == expected


@pytest.mark.parametrize(
    ("pattern", "taken", "left"),
    [
        ("a/**/b.md", ["a/b.md", "a/x/b.md", "a/x/y/b.md"], ["a/xb.md", "x/a/b.md", "b.md"]),
        ("*.md", ["b.md", "a/b.md"], ["b.mdx", "md"]),
        ("a*c/d", ["ac/d", "abc/d"], ["a/c/d"]),
        ("a?c", ["abc"], ["ac", "a/c"]),
        ("[]x]", ["]", "x"], ["y"]),
        ("a[", ["a["], ["a"]),
        ("a.b", ["a.b"], ["axb"]),
        ("a/", [], ["a", "x/a"]),
    ],
)
def test_a_pattern_matches_whole_paths_and_nothing_else(pattern, taken, left):
    paths = PathFilter([pattern], [])
    assert [path for path in (*taken, *left) if paths.takes_file(path)] == taken


def test_a_pattern_for_folders_leaves_a_file_of_that_name():
    paths = PathFilter([], ["deep/"])
    assert paths.takes_file("deep")
    assert not paths.takes_folder("sub/deep")


def test_patterns_do_not_touch_files_that_were_named(tree):
    assert [source.uri for source in discover([tree / "a.txt"], ["*.md"], ["*"])] == [str(tree / "a.txt")]


def test_a_hidden_file_that_was_named_is_taken(tree):
    source = next(discover([tree / ".hidden.md"]))
    assert source.named


def test_files_of_folders_know_that_they_were_not_named(tree):
    assert not any(source.named for source in discover([tree]))


def test_an_empty_pattern_is_refused(tree):
    with pytest.raises(UsageError, match="must name something"):
        discover([tree], include=[""])


def test_a_file_that_two_sources_reach_comes_once(tree):
    uris = [source.uri for source in discover([tree / "sub" / "c.md", tree, str(tree) + "/sub/../a.txt"])]
    assert uris.count(str(tree / "sub" / "c.md")) == 1
    assert uris.count(str(tree / "a.txt")) == 1
    assert uris[0] == str(tree / "sub" / "c.md")


def test_uris_are_absolute_and_normal(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert next(discover(["./sub/../a.txt"])).uri == str(tree / "a.txt")


def test_a_file_url_is_a_path(tmp_path):
    path = tmp_path / "a b.txt"
    path.write_text("x")
    assert next(discover([f"file://{tmp_path}/a%20b.txt"])).uri == str(path)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nosuch://example.org/a.html", "URL that fsspec knows"),
        ("zip://a.txt::file:///b.zip", "chained and cached URLs are not read"),
        ("file://elsewhere/a.txt", "elsewhere"),
        ("no/such/file.txt", "no/such/file.txt"),
        ("", "empty"),
        ("a\0b", "null"),
        (os.devnull, "neither a file nor a folder"),
    ],
)
def test_a_source_that_cannot_be_read_is_named_before_anything_is_read(source, said):
    with pytest.raises(UsageError, match=said):
        discover([source])


def test_a_missing_source_is_found_out_before_the_first_file_is_yielded(tree):
    with pytest.raises(UsageError, match="missing"):
        discover([tree, tree / "missing"])


def test_a_link_out_of_the_folder_is_skipped_with_a_warning(tree, caplog):
    (tree / "passwd").symlink_to("/etc/passwd")
    (tree / "etc").symlink_to("/etc")
    skipped = []
    names = found(tree, on_skip=skipped.append)
    assert "passwd" not in names
    assert not any(name.startswith("etc") for name in names)
    assert [Path(item.uri).name for item in skipped] == ["etc", "passwd"]
    assert "out of the folder" in caplog.text


def test_a_link_to_a_sibling_folder_with_the_same_prefix_is_out_of_the_folder(tree, tmp_path):
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x.md").write_text("x")
    (tree / "x.md").symlink_to(tmp_path / "root2" / "x.md")
    assert "x.md" not in found(tree)


def test_a_link_within_the_folder_is_read_where_it_leads(tree):
    (tree / "link.md").symlink_to(tree / "sub" / "c.md")
    source = next(source for source in discover([tree]) if source.uri.endswith("link.md"))
    assert source.path == (tree / "sub" / "c.md").resolve()


def test_links_that_form_a_circle_end(tree):
    (tree / "sub" / "up").symlink_to(tree)
    (tree / "self").symlink_to(tree / "self")
    assert len(found(tree)) == 6


def test_a_link_that_was_named_may_lead_anywhere(tree, tmp_path):
    link = tmp_path / "link.txt"
    link.symlink_to(tree / "a.txt")
    assert next(discover([link])).uri == str(link)


def test_a_pipe_in_a_folder_is_skipped(tree):
    os.mkfifo(tree / "pipe")
    skipped = []
    assert "pipe" not in found(tree, on_skip=skipped.append)
    assert [item.reason for item in skipped] == ["is no regular file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_skipped(tree):
    (tree / "sub").chmod(0)
    skipped = []
    found(tree, on_skip=skipped.append)
    (tree / "sub").chmod(0o755)
    assert len(skipped) == 1


def test_a_name_that_is_not_utf8_has_a_uri_that_is(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    with open(path, "w") as file:
        file.write("x")
    source = next(discover([tmp_path]))
    assert source.uri.encode().endswith(b"/caf\\xe9.txt")
    assert source.path.read_text() == "x"


def test_standard_input_is_named_after_its_content(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped text")))
    source = next(discover(["-"]))
    assert source.uri == f"stdin:{content_sha256(source)[:16]}"
    assert source.path.read_bytes() == b"piped text"


def test_the_content_hash_is_that_of_the_bytes(make):
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2 appendix B.1
    assert content_sha256(make("a.txt", "abc")) == expected
