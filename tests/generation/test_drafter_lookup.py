import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragkit.generation.draft_tree import DraftTree
from ragkit.generation.drafter import DraftBudget, DraftContext
from ragkit.generation.drafter_lookup import LookupDrafter
from ragkit.generation.sampling import SamplingConfig
from ragkit.types import Prompt, Segment

MUCH = DraftBudget(6, 20)


def session_of(*segments):
    prompt = Prompt(tuple(Segment(tuple(segment), str(at)) for at, segment in enumerate(segments)))
    return LookupDrafter().begin(DraftContext(prompt, SamplingConfig()))


def first_path(tree):
    """Return the tokens along the first children."""
    tokens, node = [], -1
    while children := tree.children(node):
        node = children[0]
        tokens.append(tree.token_ids[node])
    return tokens


def test_what_followed_the_answers_last_tokens_in_a_chunk_is_proposed():
    session = session_of([1, 2, 3, 4, 5, 6, 7, 8, 9])
    session.accept([3, 4])
    assert first_path(session.propose(MUCH)) == [5, 6, 7, 8, 9]
    assert session.match_length == 2


def test_the_longest_match_counts_and_not_the_last_token_alone():
    session = session_of([1, 2, 3, 10], [9, 3, 20], [8, 3, 20])
    session.accept([1, 2, 3])
    assert session.propose(MUCH).token_ids[0] == 10


def test_the_more_frequent_continuation_comes_first_and_the_other_beside_it():
    session = session_of([1, 2, 30], [1, 2, 40], [1, 2, 40])
    session.accept([1, 2])
    tree = session.propose(MUCH)
    assert [tree.token_ids[node] for node in tree.children(-1)] == [40, 30]


def test_of_equally_frequent_continuations_the_most_recent_comes_first():
    session = session_of([1, 2, 30], [1, 2, 40])
    session.accept([1, 2])
    assert session.propose(MUCH).token_ids[0] == 40


def test_the_answer_itself_is_looked_through():
    session = session_of([99])
    session.accept([1, 2, 3, 4, 1, 2])
    assert first_path(session.propose(MUCH))[:2] == [3, 4]


def test_nothing_is_continued_from_one_chunk_into_the_next():
    session = session_of([1, 2], [3, 4])
    session.accept([1, 2])
    assert session.propose(MUCH) == DraftTree(chances=())


def test_without_a_match_nothing_is_proposed():
    session = session_of([1, 2, 3])
    session.accept([7])
    assert len(session.propose(MUCH)) == 0
    assert session.match_length == 0


@pytest.mark.parametrize(("depth", "nodes"), [(0, 5), (1, 5), (3, 5), (6, 2)])
def test_a_proposal_stays_within_its_budget(depth, nodes):
    session = session_of([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 2, 7])
    session.accept([1, 2])
    tree = session.propose(DraftBudget(depth, nodes))
    assert tree.depth <= depth
    assert len(tree) <= nodes
    assert (len(tree) > 0) == (depth > 0)


def test_likelier_nodes_stand_first_behind_their_parents():
    session = session_of([1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 2, 7], [2, 3, 9])
    session.accept([1, 2])
    chances = session.propose(MUCH).chances
    assert list(chances) == sorted(chances, reverse=True)
    assert 0 < chances[-1] <= chances[0] < 1


def test_chances_follow_what_became_of_matches_drafted_or_not():
    chunk = list(range(100, 200))
    copying, straying = session_of(chunk), session_of(chunk)
    copying.accept(chunk[:60])
    for at in range(100, 160, 2):
        straying.accept([at, 7])
    straying.accept([160])
    copied, strayed = copying.propose(MUCH).chances[0], straying.propose(MUCH).chances
    assert copied > 0.9
    assert not strayed or strayed[0] < 0.15


def test_other_chunks_come_beside_the_prompts_own_and_the_answer_stays():
    session = session_of([1, 2, 30], [40, 41, 42, 43])
    session.accept([5, 1, 2])
    session.refresh(Prompt((Segment((1, 2, 77)), Segment((9, 5, 1, 2, 88)))))
    assert session.match_length == 3
    assert session.propose(MUCH).token_ids[0] == 88
    session.accept([88, 5, 1])
    assert session.propose(MUCH).token_ids[0] == 2
    session.accept([40, 41])  # the model sees the prompt as before
    assert session.propose(MUCH).token_ids[:2] == (42, 43)


def test_looking_through_other_chunks_learns_nothing_from_the_answer_twice():
    chunk = list(range(100, 200))
    session = session_of(chunk)
    session.accept(chunk[:9])
    learned = session.propose(MUCH).chances
    session.refresh(Prompt((Segment(tuple(chunk)),)))
    assert session.propose(MUCH).chances == learned


def test_a_closed_session_proposes_nothing():
    session = session_of([1, 2, 3])
    session.accept([1])
    session.close()
    session.close()
    assert len(session.propose(MUCH)) == 0


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=10), max_size=3), st.lists(st.integers(0, 3), min_size=1)
)
def test_the_first_proposal_is_what_most_often_followed_the_longest_match(chunks, answer):
    session = session_of(*chunks)
    session.accept(answer)
    texts = [*chunks, answer]
    for length in range(len(answer), 0, -1):
        end, followed, place = answer[-length:], {}, 0
        earlier = False
        for text in texts:
            for start in range(len(text) - length + 1):
                is_itself = text is answer and start == len(answer) - length
                if text[start : start + length] == end and not is_itself:
                    earlier = True
                    if start + length < len(text):
                        count, _ = followed.get(text[start + length], (0, 0))
                        followed[text[start + length]] = (count + 1, place + start + length)
            place += len(text)
        if earlier:
            break
    else:
        length, followed = 0, {}
    tree = session.propose(MUCH)
    assert session.match_length == length
    if tree.token_ids:
        assert tree.token_ids[0] == max(followed, key=followed.get)
