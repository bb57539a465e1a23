import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ragkit.errors import GenerationError
from ragkit.generation.draft_tree import ROOT, DraftTree, joined


@st.composite
def trees(draw, most=12):
    count = draw(st.integers(0, most))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(count))
    return DraftTree(tuple(draw(st.integers(0, 4)) for _ in range(count)), parents)


def words(tree):
    """Return the token path to every node."""
    return {tuple(tree.token_ids[at] for at in tree.path(node)) for node in range(len(tree))}


def test_a_chain_has_one_node_a_depth():
    chain = DraftTree.chain([7, 8, 9])
    assert chain.is_chain
    assert chain.parents == (ROOT, 0, 1)
    assert chain.depths == (0, 1, 2)
    assert chain.depth == 3
    assert chain.positions(40) == (40, 41, 42)
    assert torch.equal(chain.ancestors(), torch.ones(3, 3).tril().bool())


def test_an_empty_draft_has_no_depth():
    assert (len(DraftTree()), DraftTree().depth, DraftTree().is_chain) == (0, 0, True)
    assert DraftTree().ancestors().shape == (0, 0)


def test_children_are_tried_in_their_order():
    tree = DraftTree((1, 2, 3, 4, 5), (ROOT, 0, ROOT, 0, 2))
    assert not tree.is_chain
    assert tree.children(ROOT) == (0, 2)
    assert tree.children(0) == (1, 3)
    assert tree.children(4) == ()
    assert tree.path(4) == (2, 4)


@given(trees())
def test_a_node_sees_itself_and_its_path_alone(tree):
    seen = tree.ancestors()
    for node in range(len(tree)):
        assert set(seen[node].nonzero().flatten().tolist()) == set(tree.path(node))
        assert len(tree.path(node)) == tree.depths[node] + 1


@given(trees(), st.integers(0, 8), st.integers(0, 5))
def test_a_cut_tree_keeps_the_first_nodes_of_small_depth_behind_their_parents(tree, nodes, depth):
    cut = tree.cut(nodes, depth)
    kept = [node for node in range(len(tree)) if tree.depths[node] < depth][:nodes]
    assert cut.token_ids == tuple(tree.token_ids[node] for node in kept)
    assert cut.depths == tuple(tree.depths[node] for node in kept)
    assert words(cut) <= words(tree)


def test_a_cut_tree_keeps_the_distributions_of_its_nodes():
    rows = torch.eye(3)
    cut = DraftTree((0, 1, 2), (ROOT, 0, ROOT), rows).cut(3, 1)
    assert torch.equal(cut.probabilities, rows[[0, 2]])


@given(st.lists(trees(most=5), max_size=3))
def test_joined_certain_drafts_hold_every_path_once(several):
    tree = joined(several)
    assert words(tree) == set().union(*(words(one) for one in several))
    assert len(tree) == len(words(tree))


def test_joined_draws_stay_apart_because_each_is_a_draw_of_its_own():
    first, second = torch.full((2, 3), 0.1), torch.full((1, 3), 0.2)
    tree = joined([DraftTree.chain([1, 2], first), DraftTree(), DraftTree.chain([1], second)])
    assert (tree.token_ids, tree.parents) == ((1, 2, 1), (ROOT, 0, ROOT))
    assert torch.equal(tree.probabilities, torch.cat((first, second)))


def test_draws_are_not_joined_with_certain_drafts():
    with pytest.raises(GenerationError, match="cannot be joined"):
        joined([DraftTree.chain([1], torch.ones(1, 3)), DraftTree.chain([2])])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (((1, 2), (ROOT, 1), None), "node 1 of a draft follows 1"),
        (((1,), (-2,), None), "node 0 of a draft follows -2"),
        (((1, 2), (ROOT,), None), "2 drafted tokens have 1 parents"),
        (((1,), (ROOT,), torch.ones(2, 3)), "1 drafted tokens have 2 distributions"),
    ],
)
def test_a_tree_that_does_not_hang_together_is_refused(tree, message):
    with pytest.raises(GenerationError, match=message):
        DraftTree(*tree)
