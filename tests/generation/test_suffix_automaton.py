import random
import time

from hypothesis import given
from hypothesis import strategies as st

from ragkit.generation.suffix_automaton import ROOT_STATE, SuffixAutomaton

texts = st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=4)
grown = st.lists(st.integers(0, 2), max_size=20)


def ends(texts, stretch):
    """Return every place at which `stretch` ends, counted over all texts."""
    found, start = [], 0
    for text in texts:
        found += [
            start + stop - 1
            for stop in range(len(stretch), len(text) + 1)
            if list(text[stop - len(stretch) : stop]) == list(stretch)
        ]
        start += len(text)
    return found


def state_of(automaton, stretch):
    state = ROOT_STATE
    for token in stretch:
        state = automaton.follows[state].get(token)
        if state is None:
            return None
    return state


@given(texts, grown)
def test_every_stretch_knows_how_often_and_where_last_it_ends(given_texts, text):
    automaton = SuffixAutomaton(given_texts)
    for token in text:
        automaton.append(token)
    everything = [*given_texts, text]
    assert len(automaton) == sum(map(len, everything))
    for one in everything:
        for start in range(len(one)):
            for stop in range(start + 1, len(one) + 1):
                places, state = ends(everything, one[start:stop]), state_of(automaton, one[start:stop])
                assert automaton.count[state] == len(places)
                assert automaton.last_end[state] == max(places)


@given(texts, grown)
def test_stretches_that_no_text_holds_are_unknown(given_texts, stretch):
    automaton = SuffixAutomaton(given_texts)
    assert (state_of(automaton, stretch) is not None) == (not stretch or bool(ends(given_texts, stretch)))


@given(texts, grown)
def test_a_match_is_the_longest_suffix_that_occurred_before(given_texts, text):
    automaton, state, length = SuffixAutomaton(given_texts), ROOT_STATE, 0
    for index, token in enumerate(text):
        state, length = automaton.match(state, length, token)
        before = [*given_texts, text[:index]]
        seen = [size for size in range(1, index + 2) if ends(before, text[index + 1 - size : index + 1])]
        assert length == max(seen, default=0)
        automaton.append(token)
        state = automaton.narrowed(state, length)
        assert state == (state_of(automaton, text[index + 1 - length : index + 1]) if length else ROOT_STATE)


def test_a_text_that_repeats_one_token_does_not_grow_slower():
    automaton = SuffixAutomaton()
    for _ in range(20_000):
        automaton.append(7)
    state = state_of(automaton, [7] * 19_990)
    assert automaton.count[state] == 11


def test_growing_takes_as_long_behind_a_long_text_as_behind_a_short_one():
    chance = random.Random(1)

    def seconds(size):
        automaton = SuffixAutomaton([[chance.randrange(500) for _ in range(size)]])
        tokens = [chance.randrange(500) for _ in range(2000)]
        started = time.thread_time()
        for token in tokens:
            automaton.append(token)
        return time.thread_time() - started

    assert min(seconds(60_000) for _ in range(3)) < 8 * min(seconds(1_000) for _ in range(3))
