"""Long prompts whose question is answered in one of their passages: what drafting is measured with.

Sources, in the folder `RAGKIT_DATA`: `xquad` (`docs.jsonl`, `questions.jsonl`), `emma` (paragraphs of the novel and
questions about it), and any file of MuSiQue's form (`benchmarks/filing_questions.py` writes one of quarterly reports).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ragkit.errors import UsageError
from ragkit.generation.prompt import PromptBuilder
from ragkit.types import Chunk, Prompt, TextTokenizer, chunk_id_of

#: What is added to a question so that its answer copies.
QUOTE = " Quote the sentences of the passages that say so, word for word."


@dataclass(frozen=True, slots=True)
class GroundedQuestion:
    """A question, the passages that may answer it, the best first, and right answers where they are known."""

    text: str
    passages: Sequence[str]
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GroundedPrompt:
    """The prompt of a question, as `ragkit query` builds it."""

    question: str
    prompt: Prompt
    answers: tuple[str, ...]


def grounded_questions(source: str, data: Path | None, count: int) -> list[GroundedQuestion]:
    """Return up to `count` questions, drawn evenly from all of the source.

    Args:
        source: xquad, emma, or the path of a file of MuSiQue's form.
        data: the folder of the named sources.
        count: how many.

    Raises:
        UsageError: there is no such source, or it is not what it should be.
    """
    loader = _SOURCES.get(source)
    folder = None if data is None else data / source
    if loader is not None and (folder is None or not folder.is_dir()):
        raise UsageError(f"the questions {source} lie in the folder {source} of RAGKIT_DATA, which is not there")
    try:
        found = _musique_form(Path(source)) if loader is None or folder is None else loader(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{source} holds no questions: take {', '.join(_SOURCES)} or a file of MuSiQue's form ({error})"
        ) from error
    step = max(1, len(found) // count)
    return found[::step][:count]


def grounded_prompts(
    questions: Sequence[GroundedQuestion],
    builder: PromptBuilder,
    tokenizer: TextTokenizer,
    tokens: int,
    new_tokens: int,
    *,
    quote: bool = False,
) -> Iterator[GroundedPrompt]:
    """Yield a prompt of at most `tokens` a question, filled with its passages, the best next to the question.

    Args:
        questions: what is asked.
        builder: of the model's prompts.
        tokenizer: of the model.
        tokens: of a prompt.
        new_tokens: room for the answer, within the model's window.
        quote: ask for the words of the passages, so that the answer copies them.
    """
    for question in questions:
        asked = question.text + (QUOTE if quote else "")
        chunks = [
            Chunk(chunk_id_of("grounded", 0, number), "grounded", number, text, 0, len(text), 0)
            for number, text in enumerate(_within(question.passages, tokenizer, tokens))
        ]
        built = builder.build(asked, chunks, max_new_tokens=new_tokens, context_tokens=tokens + new_tokens)
        yield GroundedPrompt(asked, built.prompt, question.answers)


def _within(passages: Sequence[str], tokenizer: TextTokenizer, tokens: int) -> list[str]:
    """Return the first passages that fill `tokens` together: to tokenise all of a novel for each question is slow."""
    kept: list[str] = []
    held = 0
    for text in passages:
        kept.append(text)
        held += len(tokenizer.encode(text))
        if held >= tokens:
            break
    return kept


def _xquad(folder: Path) -> list[GroundedQuestion]:
    texts = {row["doc"]: str(row["text"]) for row in _lines(folder / "docs.jsonl")}
    paragraphs = {name: text.split("\n\n") for name, text in texts.items()}
    names = list(texts)
    found = []
    for row in _lines(folder / "questions.jsonl"):
        name = row["doc"]
        gold = texts[name][row["para_start"] : row["para_end"]].strip("\n")
        at = names.index(name)
        others = [one for other in (*names[at:], *names[:at]) for one in paragraphs[other] if one.strip() != gold]
        found.append(GroundedQuestion(str(row["question"]), [gold, *others], (str(row["answer"]),)))
    return found


def _emma(folder: Path) -> list[GroundedQuestion]:
    paragraphs = [str(row["Chunk"]) for row in _lines(folder / "Emma_-_Jane_Austen_Paragraph.jsonl")]
    found = []
    for row in _lines(folder / "Questions_-_Emma_-_Jane_Austen.jsonl"):
        needle = str(row["Chunk Must Contain"])
        at = next((index for index, text in enumerate(paragraphs) if needle in text), None)
        if at is not None:
            by_distance = sorted(range(len(paragraphs)), key=lambda index: abs(index - at))
            found.append(GroundedQuestion(str(row["Question"]), [paragraphs[index] for index in by_distance]))
    return found


def _musique_form(file: Path) -> list[GroundedQuestion]:
    items = json.loads(file.read_text(encoding="utf-8"))
    return [
        GroundedQuestion(
            str(item["question"]),
            [str(context["text"]) for context in reversed(item["ctxs"])],
            tuple(str(answer) for answer in item["answers"]),
        )
        for item in items
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


_SOURCES: dict[str, Callable[[Path], list[GroundedQuestion]]] = {"xquad": _xquad, "emma": _emma}
