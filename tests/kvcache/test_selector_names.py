import pytest

from ragkit.config import SelectorName
from ragkit.errors import KVCacheError
from ragkit.kvcache.selectors import SELECTORS, make_selector


@pytest.mark.parametrize("name", SelectorName)
def test_every_selector_is_made_by_its_own_name(name):
    assert make_selector(name.value, 4).name == name
    assert set(SELECTORS) == set(SelectorName)


def test_an_unknown_selector_is_refused_with_the_names_that_are_there():
    with pytest.raises(KVCacheError, match="no token selector 'best'; there are everything, none"):
        make_selector("best", 4)
