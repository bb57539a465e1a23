"""The whole command line: help, common options, exit codes, errors on one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ragkit import __version__
from ragkit.cli.signals import Interrupted
from ragkit.errors import (
    ConfigError,
    EmbedderMismatchError,
    ModelError,
    RagkitError,
    StoreCorruptError,
    StoreLockedError,
    StoreSpaceError,
)

COMMANDS = (
    ("ingest",),
    ("query",),
    ("search",),
    ("chunk",),
    ("ls",),
    ("rm",),
    ("status",),
    ("gc",),
    ("verify",),
    ("doctor",),
    ("models", "pull"),
    ("models", "list"),
    ("models", "path"),
    ("config", "show"),
)
COMMON = ("--store", "--json", "--quiet", "-q", "--verbose", "-v", "--offline", "--device", "--config")
RAGKIT = str(Path(sys.executable).parent / "ragkit")


def test_the_version_is_the_packages(run):
    assert run("--version").out == f"ragkit {__version__}\n"


def test_without_a_command_the_help_is_shown(run):
    result = run()
    assert (result.code, result.err) == (0, "")
    assert result.out == run("--help").out
    assert all(command[0] in result.out for command in COMMANDS)


@pytest.mark.parametrize("group", ["models", "config"])
def test_a_group_without_a_command_shows_its_help(run, group):
    result = run(group)
    assert "Commands:" in result.err
    assert result.code == 2


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_takes_the_common_options(run, command):
    result = run(*command, "--help")
    assert result.code == 0
    words = result.out.replace(",", " ").split()
    assert [option for option in COMMON if option not in words] == []


def test_common_options_work_before_and_after_the_command(run, world):
    assert run("--json", "--store", "a", "ls").json == run("ls", "--json", "--store", "a").json
    assert world.stores == [Path("a"), Path("a")]


def test_a_common_option_after_the_command_wins(run, world):
    run("--store", "before", "--device", "cpu", "ls", "--store", "after")
    assert world.stores == [Path("after")]
    assert str(world.configs[0].device) == "cpu"


def test_the_store_is_dot_ragkit_unless_the_environment_says_otherwise(run, world, monkeypatch):
    run("ls")
    monkeypatch.setenv("RAGKIT_STORE", "elsewhere")
    run("ls")
    assert world.stores == [Path(".ragkit"), Path("elsewhere")]


def test_offline_reaches_hugging_face_and_the_pipeline(run, world, monkeypatch):
    run("ls", "--offline")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert world.configs[0].offline is True


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [
        (RagkitError("x"), "error", 1),
        (ModelError("x"), "model", 1),
        (ConfigError("x"), "config", 2),
        (StoreLockedError("x"), "store_locked", 4),
        (StoreCorruptError("x"), "store_corrupt", 4),
        (StoreSpaceError("x"), "store_space", 4),
        (EmbedderMismatchError("x"), "embedder_mismatch", 4),
        (OSError(28, "No space left on device"), "store_space", 4),
        (PermissionError(13, "Permission denied"), "os", 1),
        (ZeroDivisionError("division by zero"), "internal", 1),
        (MemoryError(), "oom", 1),
        (Interrupted(signal.SIGINT), "interrupted", 130),
        (Interrupted(signal.SIGTERM), "interrupted", 143),
    ],
)
def test_each_kind_of_error_has_its_code_and_exit_code(run, world, error, code, exit_code):
    world.error = error
    result = run("search", "anything", "--json")
    assert result.code == exit_code
    assert set(result.json) == {"error"}
    assert result.json["error"]["code"] == code
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert f"error: {result.json['error']['message']}\n" == result.err


def test_an_error_is_one_line_even_where_its_message_has_several(run, world):
    world.error = ModelError("first\n  second\x1b[2J")
    result = run("search", "anything")
    assert (result.out, result.err) == ("", "error: first second[2J\n")


def test_a_missing_store_is_an_error_that_says_what_to_do(run, world):
    world.store_exists = False
    for command in (["query", "q"], ["search", "q"], ["ls"], ["status"], ["rm", "x"], ["gc"], ["verify"]):
        result = run(*command)
        assert result.code == 4
        assert result.err == "error: there is no store in .ragkit; `ragkit ingest SOURCE --store .ragkit` makes one\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serach", "x"], "No such command 'serach'. Did you mean 'search'?"),
        (["search"], "Missing argument 'QUESTION'; `ragkit search --help` shows the usage"),
        (
            ["query", "x", "--generatr", "y"],
            "No such option: --generatr (Possible options: --generator, --temperature); `ragkit query --help`",
        ),
        (
            ["query", "x", "--sed", "1"],
            "No such option: --sed (Possible options: --seed, --store); `ragkit query --help` shows the usage",
        ),
        (
            ["search", "x", "-k", "0"],
            "Invalid value for '-k': Input should be greater than or equal to 1, got '0'; `ragkit search --help` shows",
        ),
        (
            ["search", "x", "-k", "many"],
            "Invalid value for '-k': Input should be a valid integer, unable to parse string as an integer, got 'many'",
        ),
        (["search", "x", "--device", "tpu"], "Invalid value for '--device': 'tpu' is not one of 'auto', 'cpu', 'cuda'"),
        (["search", " "], "the question is empty; give one in quotes"),
        (["search", "x", "--filter", "year"], "--filter takes KEY=VALUE, got 'year'"),
        (["ingest"], "ingest needs at least one SOURCE: a file, a folder, a URL, or - for stdin"),
        (["ls", "--config", "gone.toml"], "--config needs an existing TOML file, got 'gone.toml'"),
        (["query", "x", "--top-p", "2"], "generation.top_p must lie in (0, 1], got 2.0 (set by --top-p)"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, arguments, message):
    result = run(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith(f"error: {message}")
    assert result.err.count("\n") == 1


def test_wrong_usage_with_json_is_one_json_object(run):
    assert run("search", "--json").json["error"]["code"] == "usage"
    assert run("--json").json["error"] == {
        "code": "usage",
        "message": "Missing command; `ragkit --help` shows the usage",
    }


def test_an_argument_that_only_looks_like_the_json_option_is_none(run, world):
    world.error = ModelError("broken")
    assert run("search", "--", "--json").out == ""


def test_the_debug_variable_shows_the_traceback(run, world, monkeypatch):
    world.error = ModelError("broken")
    monkeypatch.setenv("RAGKIT_DEBUG", "1")
    result = run("search", "x")
    assert "Traceback (most recent call last)" in result.err
    assert result.err.endswith("error: broken\n")


def test_a_bug_says_how_to_see_where(run, world):
    world.error = KeyError("lost")
    assert run("search", "x").err == "error: this is a bug in ragkit: KeyError: 'lost'; RAGKIT_DEBUG=1 shows where\n"


def test_a_setting_that_means_nothing_is_a_warning_on_stderr(run, monkeypatch):
    monkeypatch.setenv("RAGKIT_PARTY", "1")
    result = run("ls", "--json")
    assert result.err == "warning: RAGKIT_PARTY is set but means nothing to ragkit\n"
    assert result.json["sources"]
    assert run("ls", "-q").err == ""


def test_a_reader_that_goes_away_does_not_fail_the_command(tmp_path):
    """`ragkit config show | head -c 1`: no traceback, exit code 0, as long as the work itself went well."""
    process = subprocess.Popen(
        [RAGKIT, "config", "show", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


def test_completion_offers_the_commands(tmp_path):
    done = subprocess.run(
        [RAGKIT],
        env={"_RAGKIT_COMPLETE": "complete_bash", "COMP_WORDS": "ragkit se", "COMP_CWORD": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.split() == ["search"]


def test_output_that_the_locale_cannot_encode_is_escaped(tmp_path):
    (tmp_path / "ragkit.toml").write_text("[generation]\nsystem_prompt = 'grüße'\n", encoding="utf-8")
    done = subprocess.run(
        [RAGKIT, "config", "show", "--json"],
        env={"PYTHONIOENCODING": "ascii", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
    )
    assert json.loads(done.stdout)["settings"]["generation.system_prompt"]["value"] == "grüße"
