"""The page selectors by name."""

from __future__ import annotations

from collections.abc import Callable

from ragkit.config import PageSelectorName
from ragkit.errors import KVCacheError
from ragkit.kvcache.page_selector import PageSelector
from ragkit.kvcache.page_selector_mean_key import MeanKey
from ragkit.kvcache.page_selector_static import EveryPage, SinksAndWindow

#: How each is made.
PAGE_SELECTORS: dict[PageSelectorName, Callable[[], PageSelector]] = {
    PageSelectorName.EVERYTHING: EveryPage,
    PageSelectorName.WINDOW: SinksAndWindow,
    PageSelectorName.MEAN_KEY: MeanKey,
}


def make_page_selector(name: str) -> PageSelector:
    """Return the page selector `name`.

    Raises:
        KVCacheError: there is no such selector.
    """
    if name not in list(PageSelectorName):
        raise KVCacheError(f"there is no page selector {name!r}; there are {', '.join(PageSelectorName)}")
    return PAGE_SELECTORS[PageSelectorName(name)]()
