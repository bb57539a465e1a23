"""Documents with known answers: of the length asked for, the same every time, made with linear work."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from doubles import WordTokenizer

from ragkit.bench.haystacks import NOISE, TooShortError
from ragkit.bench.long_items import LongItem, Material
from ragkit.bench.needle import NeedleTask, spaced_depths
from ragkit.bench.ruler_niah import Kind, OtherNeedles
from ragkit.bench.ruler_tasks import RULER_TASKS, ruler_tasks
from ragkit.errors import UsageError

TASKS = [NeedleTask(spaced_depths(11)), NeedleTask(spaced_depths(11), together=True), *RULER_TASKS.values()]
IDS = ["needle", "needles together", *RULER_TASKS]
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
LENGTH = 9000


class CountingTokenizer(WordTokenizer):
    """Counts the characters that it is given."""

    def __init__(self) -> None:
        self.characters = 0

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        self.characters += sum(map(len, texts))
        return super().count_batch(texts)


def made(task, length: int = LENGTH, index: int = 1, **changes) -> LongItem:
    return task.make(Material(WordTokenizer(), **changes), length, index)


def needles_of(document: str) -> list[tuple[str, str]]:
    return re.findall(r"secret (?:number|UUID) of (\S+) is (\S+)\.", document)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_the_same_seed_gives_the_same_item_and_another_one_another(task):
    item = made(task, questions=2)
    assert made(task, questions=2) == item
    other = made(task, questions=2, seed=1)
    assert other.document != item.document
    assert other.questions[0].answers != item.questions[0].answers
    assert made(task, index=2).document != item.document


@pytest.mark.parametrize("length", [4000, LENGTH])
@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_everything_together_has_the_length_asked_for_within_one_percent_or_one_record(task, length):
    item = made(task, length, frame_tokens=40)
    tokenizer = WordTokenizer()
    longest = max(tokenizer.count_batch([one.text + one.answer_prefix for one in item.questions]))
    [document] = tokenizer.count_batch([item.document])
    assert item.tokens == 40 + document + longest + item.max_new_tokens
    assert max(0.01 * length, record_tokens(item)) >= length - item.tokens >= 0


def record_tokens(item: LongItem) -> int:
    """Return the tokens of the largest thing that is in a document whole or not at all."""
    parts = item.document.splitlines() if item.task in ("kv_retrieval", "niah_multikey_3") else ["", "."]
    return max(WordTokenizer().count_batch(parts)) + (80 if item.task.startswith("qa") else 0)


@pytest.mark.models
@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_so_it_is_with_the_tokenizer_of_a_model(task, bundled_tokenizer):
    item = task.make(Material(bundled_tokenizer), 8192, 0)
    assert len(bundled_tokenizer.encode(item.document)) < item.tokens
    assert 0.99 * 8192 <= item.tokens <= 8192


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_every_gold_span_says_an_answer_and_every_answer_has_one(task):
    item = made(task, questions=3)
    for question in item.questions:
        said = [item.document[start:stop] for start, stop in question.gold]
        assert sorted(said) == sorted(question.answers)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_questions_do_not_depend_on_the_length(task):
    short, long = (made(task, length) for length in (LENGTH // 2, LENGTH))
    assert [one.text for one in short.questions] == [one.text for one in long.questions]
    assert [one.answers for one in short.questions] == [one.answers for one in long.questions]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_document_says_nothing_of_its_questions(task):
    item = made(task)
    for question in item.questions:
        assert question.text not in item.document
        assert question.answer_prefix not in item.document


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_the_tokenizer_reads_each_document_at_most_five_times_whatever_its_length(task):
    tokenizer = CountingTokenizer()
    material = Material(tokenizer)
    task.make(material, LENGTH, 0)  # what is read once for all items
    for length in (LENGTH, 8 * LENGTH):
        before = tokenizer.characters
        item = task.make(material, length, 1)
        assert tokenizer.characters - before <= 5 * len(item.document)


@pytest.mark.parametrize("together", [False, True])
def test_needles_stand_at_their_depths_between_sentences(together):
    task = NeedleTask(spaced_depths(11), together)
    items = [made(task, index=index) for index in range(task.documents)]
    questions = [(item.document, one) for item in items for one in item.questions]
    assert [one.depth for _, one in questions] == list(spaced_depths(11))
    for document, question in questions:
        start = document.rindex("Keep in mind", 0, question.gold[0][0])
        assert start / len(document) == pytest.approx(question.depth, abs=0.02)
        assert start == 0 or document[start - 2] in ".?!”"


def test_one_depth_is_the_middle():
    assert spaced_depths(1) == (0.5,)
    assert spaced_depths(3) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("name", "keys", "values", "answers"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 4, 1),
        ("niah_multivalue", 1, 4, 4),
        ("niah_multiquery", 4, 4, 4),
    ],
)
def test_needle_tasks_have_the_published_numbers_of_keys_values_and_queries(name, keys, values, answers):
    item = made(RULER_TASKS[name])
    found = needles_of(item.document)
    assert (len({key for key, _ in found}), len({value for _, value in found})) == (keys, values)
    [question] = item.questions
    assert len(question.answers) == answers
    asked = [value for key, value in found if key in question.text]
    assert sorted(asked) == sorted(question.answers)


@pytest.mark.parametrize(("name", "key"), [("niah_multikey_2", r"[a-z]+-[a-z]+"), ("niah_multikey_3", UUID)])
def test_among_needles_every_line_is_one_and_several_can_be_asked_for(name, key):
    item = made(RULER_TASKS[name], questions=3)
    found = needles_of(item.document)
    assert len(found) == len(item.document.splitlines()) > 100
    assert all(re.fullmatch(key, one) for one, _ in found)
    assert [[value for one, value in found if f" {one}?" in question.text] for question in item.questions] == [
        list(question.answers) for question in item.questions
    ]


def test_no_other_needle_has_a_key_that_is_asked_for():
    def keys(taken: frozenset[str]) -> list[str]:
        others = OtherNeedles(Random(0), Kind.WORDS, Kind.NUMBER, taken, WordTokenizer())
        return [key for key, _ in needles_of("".join(others.take(2000).texts))]

    drawn = keys(frozenset())
    left = keys(frozenset(drawn[3:6]))
    assert len(left) == len(drawn) > 50
    assert not set(left) & set(drawn[3:6])


def test_noise_is_one_line_again_and_again():
    lines = Counter(made(RULER_TASKS["niah_single_1"]).document.splitlines(keepends=True))
    assert lines.pop(NOISE) > 100
    assert list(lines.values()) == [1]


def test_variables_form_one_chain_of_four_hops_in_order():
    item = made(RULER_TASKS["vt"])
    [question] = item.questions
    [(first, value)] = re.findall(r"Variable ([A-Z]{5}) is (\d{5})\.", item.document)
    hops = re.findall(r"Variable ([A-Z]{5}) is what variable ([A-Z]{5}) is\.", item.document)
    assert value in question.text
    assert [before for _, before in hops] == list(question.answers[:4])
    assert (first, *(name for name, _ in hops)) == question.answers
    assert [start for start, _ in question.gold] == sorted(start for start, _ in question.gold)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2500, 6, 1), (LENGTH, 30, 3), (200_000, 30, 3)])
def test_ten_words_are_common_and_no_list_is_too_long_for_the_words_that_there_are(length, often, seldom):
    item = made(RULER_TASKS["cwe"], length)
    lines = item.document.splitlines()
    assert [line.split(". ")[0] for line in lines] == [str(number) for number in range(1, len(lines) + 1)]
    counts = Counter(line.split(". ")[1] for line in lines).most_common()
    assert {word for word, _ in counts[:10]} == set(item.questions[0].answers)
    assert {count for _, count in counts[:10]} == {often}
    assert {count for _, count in counts[10:]} == {seldom}


def test_coded_words_follow_zipf_and_the_second_to_fourth_are_asked_for():
    item = made(RULER_TASKS["fwe"])
    counts = Counter(item.document.split()).most_common()
    assert counts[0][0] == "..."
    assert tuple(word for word, _ in counts[1:4]) == item.questions[0].answers
    assert [count / counts[0][1] for _, count in counts[1:4]] == pytest.approx([1 / 4, 1 / 9, 1 / 16], rel=0.02)
    assert len(counts) <= LENGTH // 50 + 1


def test_records_are_one_json_object_and_keys_are_asked_for_all_over_it():
    item = made(RULER_TASKS["kv_retrieval"], questions=4)
    records = json.loads(item.document)
    assert all(re.fullmatch(UUID, text) for pair in records.items() for text in pair)
    for place, question in enumerate(item.questions):
        [key] = re.findall(UUID, question.text)
        assert (records[key],) == question.answers
        assert place / 4 - 0.02 <= question.depth <= (place + 1) / 4 + 0.02


@pytest.mark.parametrize(("name", "hops"), [("qa_1", 1), ("qa_2", 2)])
def test_made_questions_are_answered_by_one_passage_or_two_that_stand_there_once(name, hops):
    item = made(RULER_TASKS[name])
    [question] = item.questions
    passages = item.document.split("\n\n")[:-1]
    assert len(set(passages)) == len(passages) > 20
    person = re.search(r"(?:was|which) ((?:[A-Z]\w+ ?){2})(?:was )?born", question.text)[1].strip()
    [about] = [passage for passage in passages if passage.startswith(f"Passage. {person} was")]
    town = re.search(r"born in (\w+) in", about)[1]
    if hops == 1:
        assert question.answers == (town,)
    else:
        [place] = [passage for passage in passages if passage.startswith(f"Passage. {town} lies")]
        assert question.answers == (re.search(r"the river (\w+) ", place)[1],)


def test_public_questions_stand_among_other_passages_and_at_different_places(tmp_path):
    write_squad(tmp_path)
    depths = set()
    for index in range(4):
        item = made(RULER_TASKS["qa_1"], 3000, index, data=tmp_path)
        [question] = item.questions
        [(start, stop)] = question.gold
        assert item.document[start:stop] in question.answers
        assert item.document.count(f"Ford {item.document[start:stop][5:]} is old.") == 1
        depths.add(round(question.depth, 2))
    assert len(depths) == 4


def test_a_question_whose_passages_are_longer_than_the_document_is_not_drawn(tmp_path):
    (tmp_path / "musique").mkdir()
    rows = [
        {
            "question": f"Who built it, in {words} words?",
            "answers": ["Ada"],
            "ctxs": [{"text": "Ada " + "built " * words}],
        }
        for words in (200, 2000)
    ]
    (tmp_path / "musique" / "musique_s.json").write_text(json.dumps(rows))
    asked = {made(RULER_TASKS["qa_2"], 1500, index, data=tmp_path).questions[0].text for index in range(3)}
    assert asked == {"Who built it, in 200 words?"}
    with pytest.raises(TooShortError, match=r"^the questions' own passages take at least 4\d\d tokens, and there is"):
        made(RULER_TASKS["qa_2"], 300, data=tmp_path)


def write_squad(folder: Path) -> None:
    paragraphs = [
        {
            "context": f"Ford {number} is old. It has {number + 3} houses and a mill.",
            "qas": [
                {
                    "question": f"What is old, of number {number}?",
                    "answers": [{"text": f"Ford {number}"}],
                    "is_impossible": False,
                },
                {"question": "What is new?", "answers": [], "is_impossible": True},
            ],
        }
        for number in range(10, 30)
    ]
    (folder / "ruler" / "derived").mkdir(parents=True)
    (folder / "ruler" / "derived" / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))


def test_damaged_public_data_are_named(tmp_path):
    (tmp_path / "ruler" / "derived").mkdir(parents=True)
    (tmp_path / "ruler" / "derived" / "squad.json").write_text('{"data": [{}]}')
    with pytest.raises(UsageError, match=r"squad\.json does not hold questions as published: KeyError: 'paragraphs'"):
        made(RULER_TASKS["qa_1"], data=tmp_path)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_a_length_without_room_is_refused(task):
    with pytest.raises(TooShortError, match=r"room"):
        made(task, 100)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'niah_multikey_2'"):
        ruler_tasks(["niah_multikey2"])
    assert [task.name for task in ruler_tasks([])] == list(RULER_TASKS)
    assert len(RULER_TASKS) == 14
