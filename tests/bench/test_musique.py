"""Reading MuSiQue."""

from __future__ import annotations

import json

from ragkit.bench.musique import musique_items, question_items


def test_items_whose_answer_stands_in_no_passage_are_left_out(tmp_path):
    passages = [{"title": "A", "text": "He studied at The Exeter College, Oxford."}, {"title": "B", "text": "Other."}]
    items = [
        {"question": "Where?", "answers": ["Cambridge"], "ctxs": passages},
        {"question": "Where then?", "answers": ["exeter college"], "ctxs": passages},
    ]
    (tmp_path / "musique_s.json").write_text(json.dumps(items), encoding="utf-8")
    [item] = musique_items(tmp_path)
    assert (item.index, item.question, len(item.passages)) == (1, "Where then?", 2)


def test_items_without_answers_stay(tmp_path):
    passages = [{"text": "The segments are three."}]
    items = [
        {"question": "Which segments?", "answers": [], "ctxs": passages},
        {"question": "How many?", "answers": ["four"], "ctxs": passages},
    ]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps(items), encoding="utf-8")
    [item] = question_items(file)
    assert (item.index, item.answers) == (0, ())


def test_what_stands_before_a_passage_is_read_where_the_file_says_it(tmp_path):
    passages = [{"text": "It grew.", "before": ["The company.", "Its sales."]}, {"text": "Other."}]
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([{"question": "What?", "answers": [], "ctxs": passages}]), encoding="utf-8")
    [item] = question_items(file)
    assert item.before == (("The company.", "Its sales."), ())
