"""The page selectors by name."""

from __future__ import annotations

from collections.abc import Callable

from ragkit.config import PageSelectorName
from ragkit.errors import KVCacheError
from ragkit.kvcache.page_selector import PageSelector
from ragkit.kvcache.page_selector_centroids import Centroids
from ragkit.kvcache.page_selector_low_rank import LowRank
from ragkit.kvcache.page_selector_mean_key import MeanKey
from ragkit.kvcache.page_selector_min_max import MinMax
from ragkit.kvcache.page_selector_representative import RepresentativeKeys
from ragkit.kvcache.page_selector_soft_vote import SoftVote
from ragkit.kvcache.page_selector_static import EveryPage, SinksAndWindow

#: How each is made.
PAGE_SELECTORS: dict[PageSelectorName, Callable[[], PageSelector]] = {
    PageSelectorName.EVERYTHING: EveryPage,
    PageSelectorName.WINDOW: SinksAndWindow,
    PageSelectorName.MEAN_KEY: MeanKey,
    PageSelectorName.REPRESENTATIVE: RepresentativeKeys,
    PageSelectorName.MIN_MAX: MinMax,
    PageSelectorName.LOW_RANK: LowRank,
    PageSelectorName.SOFT_VOTE: SoftVote,
    PageSelectorName.CENTROIDS: Centroids,
    PageSelectorName.CENTROIDS_2: lambda: Centroids(levels=2),
}


def make_page_selector(name: str) -> PageSelector:
    """Return the page selector `name`.

    Raises:
        KVCacheError: there is no such selector.
    """
    if name not in list(PageSelectorName):
        raise KVCacheError(f"there is no page selector {name!r}; there are {', '.join(PageSelectorName)}")
    return PAGE_SELECTORS[PageSelectorName(name)]()
