"""Writes docs/cli.md from the application itself: help texts, settings, exit codes.

`python docs/generate.py` writes it; with `--check` it exits with 1 where the page is not what it would write.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).resolve().parent / "cli.md"
WIDTH = 100

INTRODUCTION = """\
# Command line

This page is written by `make docs`; a test compares the two.

Results go to stdout. Progress, notes, warnings and errors go to stderr; bars are drawn on a terminal only, and
`NO_COLOR` is respected. `--json` prints exactly one JSON object on stdout, also on failure. The common options
(`--store` to `--config`) may stand before or after the command.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | wrong usage, or an impossible setting |
| 3 | partly done: some sources failed, and are named, or KV found no room (`kv.left_out`) |
| 4 | the store is missing, locked or damaged, was built with another embedder, or the disk is full |
| 130, 143 | stopped by SIGINT or SIGTERM; an ingest first finishes its running commit, a measurement shows what is done |

An error is one line. `RAGKIT_DEBUG=1` shows the traceback as well. `ragkit --install-completion` sets up the shell's
completion.

## JSON

Keys may be added, never renamed. Character offsets are half-open and count Unicode code points of the document's text.

| command | keys |
|---|---|
| any that fails | `error`: {`code`, `message`} |
| `ingest` | `added`, `updated`, `unchanged`, `relinked`, `removed`, `skipped`, `failed`: [{`uri`, `stage`, `code`, `message`}], `chunks`, `tokens`, `seconds`, `dry_run`, `interrupted`, `warnings`, `timings_s`, `kv`: {`computed`, `present`, `bytes`, `shared`, `left_out`}; null without `--kv`, `pages`: {`read`, `present`, `tokens`, `bytes`}; null without `--pages` |
| `query` | `answer`, `found`, `citations`: [{`uri`, `page`, `char_start`, `char_stop`, `quote`, `score`, `doc_id`}], `strategy`, `model`, `tokens`: {`prompt`, `reused`, `recomputed`, `generated`}, `dropped_chunks`, `warnings`, `kv`: {`hits`, `misses`, `holes`, `bytes_by_tier`, `recomputed`}, `draft`: {`mode`, `drafter`, `drafted`, `accepted`, `steps`, `ms_per_step`}, `timings_ms`: {`load_models`, `retrieve`, `load_kv`, `prefill`, `first_token`, `total`; where chunks were blended also `compute_kv`, `select`, `blend`, parts of `prefill` as `load_kv` is; where a document was read into pages also `read_document`}, `attended`: [{`token_start`, `token_stop`, `char_start`, `char_stop`, `share`}]; empty but for `pages` |
| `search` | `hits`: [{`rank`, `score`, `uri`, `page`, `char_start`, `char_stop`, `text`, `chunk_id`, `metadata`: {`heading_path`, `table_header`; where they apply}}], `timings_ms`, `warnings` |
| `chunk` | `chunker`, `chunks`: [{`index`, `char_start`, `char_stop`, `token_count`, `text`, `page`, `uri`, `chunk_id`, `metadata`: as in `search`, `boundary`: {`kind`, `signal`}; null before the first}], `statistics`: {`chunks`, `tokens`: {`min`, `median`, `max`}, `cap`, `over_cap`}, `signals`: [{`uri`, `measure`, `threshold`, `offsets`, `values`, `cut`}]; empty where the chunker has none |
| `eval chunking` | `evaluation`, `date`, `embedder`, `cap_unit`, `sets`: [{`name`, `documents`, `questions`, `characters`, `metric`}], `rows`: [{`data`, `chunker`, `cap`, `chunks`, `mean_characters`, `characters`, `metric`, `scores`: {`dense`, `bm25`, `hybrid`}, `against_baseline`: the same, each {`mean`, `low`, `high`}, `first_chunk`, `first_chunk_against_baseline`: as those}], `chroma`: [{`name`, `characters`, `their_recall`, `our_recall`, `by_recall`, `their_iou`, `our_iou`, `by_iou`, `near_recall`, `near_iou`, `hybrid_recall`, `hybrid_iou`: each {`score`, `by`, `characters`}}], `points`: [{`data`, `chunker`, `cap`, `mode`, `characters`, `recall`, `iou`, `hit`}], `interrupted`, `machine`, `versions` |
| `eval needle`, `eval ruler` | `evaluation`, `date`, `rows`: [{`strategy`, `task`, `length`, `questions`, `score`, `low`, `high`, `against_first`: {`mean`, `low`, `high`} or null, `gold_shown`, `prompt_tokens`, `document_seconds`, `seconds`}], `cells`: [{`strategy`, `row`: a depth or task, `length`, `score`, `questions`}], `outcomes`: [{`strategy`, `task`, `length`, `index`, `number`, `depth`, `tokens`, `question`, `answers`, `text`, `score`, `gold_shown`, `prompt_tokens`, `document_seconds`, `seconds`}], `notes`, `settings`, `seconds`, `interrupted`, `plots`: [path], `machine`, `versions`; `score` and `gold_shown` are percent in `rows` and `cells`, shares in `outcomes` |
| `ls` | `sources`: [{`uri`, `status`, `documents`, `chunks`, `bytes`, `sha256`, `media_type`, `reader`, `failure`}] |
| `rm` | `removed`: [uri], `erased` |
| `status` | `store`, `generation`, `sources`, `failed`, `damaged`, `documents`, `chunks`, `tokens`, `segments`, `bytes_on_disk`, `embedder`, `dim`, `chunker`, `format_version`, `kv`: {`chunks`, `bytes_by_tier`, `codec`, `estimated_bytes`, `page_bytes`, `other_bytes`, `unknown_bytes`}, `failed_sources`: as in `ls` |
| `export` | `target`, `kind`: `chunks` or `documents`, `rows`, `bytes`, `generation` |
| `gc` | `bytes_freed`, `removed_files`, `rewritten_segments`, `pending_files` |
| `verify` | `generation`, `documents`, `chunks`, `bytes_read`, `problems`: [{`part`, `name`, `message`, `remedy`, `uris`}], `marked`: [uri] |
| `bench blend` | `benchmark`, `date`, `model`, `settings`, `speed`: [{`prefill`, `kv_from`, `ratio`, `tokens`, `text`, `first_logits_ms`, `compute_ms`, `load_ms`, `select_ms`, `recompute_ms`, `overlapped_ms`, `times_full`, `samples_ms`}], `check`: {`tokens`, `gap`, `noise`}, `quality`: [{`variant`, `prompts`, `recomputed`, `kl_first`, `recovered_first`: {`value`, `low`, `high`}, `kl_mean`, `recovered_mean`, `agrees_first`, `nll`, `recovered_nll`, `nll_moved`, `recovered_nll_moved`, `largest_logit_difference`}], `distances`: the same by prompt and variant, `quality_from`, `quality_tokens`, `notes`, `seconds`, `interrupted`, `plots`: [path], `machine`, `versions`; shares are of 1 |
| `models list` | `models`: [{`name`, `role`, `path`, `bytes`, `licence`, `source`}] |
| `models pull` | `models`: [{`name`, `path`}] |
| `models path` | `name`, `path` |
| `config show` | `settings`: {key: {`value`, `origin`}} |
| `doctor` | `ok`, `checks`: [{`name`, `status`, `detail`, `remedy`}] |
"""  # noqa: E501

SETTINGS = """\
## Settings

In rising precedence: defaults; `ragkit.toml` in the user's configuration folder (in `RAGKIT_HOME` where that is set);
`ragkit.toml` in the working folder, or the file that `--config` names; environment variables; options.
`ragkit config show --origin` prints every value and where it came from. An unknown key is an error that names the
nearest valid one. Lists in variables are separated by commas.
"""


def page() -> str:
    """Return the whole page."""
    from ragkit.cli.app import app

    command = typer.main.get_command(app)
    return "\n".join([INTRODUCTION, *_sections(command, "ragkit"), SETTINGS, *_settings_table(), ""])


def main() -> int:
    """Write the page, or compare it with what is there."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if current == page():
        return 0
    sys.stderr.write(f"{PAGE.name} is out of date: run `make docs`\n")
    return 1


def _sections(command: Any, path: str, parent: Any = None) -> Iterator[str]:
    context = command.make_context(path.split()[-1], [], parent=parent, resilient_parsing=True)
    context.terminal_width = WIDTH
    context.max_content_width = WIDTH
    yield f"## `{path}`\n\n```text\n{context.get_help().rstrip()}\n```\n"
    for name in getattr(command, "commands", {}):
        yield from _sections(command.commands[name], f"{path} {name}", context)


def _settings_table() -> Iterator[str]:
    from ragkit.setting_values import to_text
    from ragkit.settings import load_settings, setting_keys, type_of, variable_of

    nowhere = Path(os.devnull)
    settings = load_settings(environ={}, folder=nowhere, user_folder=nowhere)
    defaults = {item.key: item.value for item in settings.values}
    yield "| key | variable | default | type |\n|---|---|---|---|"
    for key in setting_keys():
        default = to_text(str(defaults[key]) if key == "store" else defaults[key])
        yield f"| `{key}` | `{variable_of(key)}` | `{default}` | {type_of(key)} |"


if __name__ == "__main__":
    sys.exit(main())
