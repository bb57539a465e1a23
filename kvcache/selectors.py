"""The selectors by name."""

from __future__ import annotations

from collections.abc import Callable

from ragkit.config import SelectorName
from ragkit.errors import KVCacheError
from ragkit.kvcache.selectors_cache_craft import CacheCraft
from ragkit.kvcache.selectors_deviation import DeviationAtOneLayer, DeviationOf, GradualFiltering
from ragkit.kvcache.selectors_question import QuestionAttention, TwoRounds
from ragkit.kvcache.selectors_static import Everything, FirstTokens, NoTokens, RandomTokens
from ragkit.kvcache.token_selection import TokenSelector

#: How each is made for a model of so many layers.
SELECTORS: dict[SelectorName, Callable[[int], TokenSelector]] = {
    SelectorName.EVERYTHING: lambda num_layers: Everything(),
    SelectorName.NONE: lambda num_layers: NoTokens(),
    SelectorName.RANDOM: lambda num_layers: RandomTokens(),
    SelectorName.FIRST: lambda num_layers: FirstTokens(),
    SelectorName.KEY_DEVIATION: lambda num_layers: DeviationAtOneLayer(DeviationOf.KEYS),
    SelectorName.VALUE_DEVIATION: lambda num_layers: DeviationAtOneLayer(DeviationOf.VALUES),
    SelectorName.KV_DEVIATION: lambda num_layers: DeviationAtOneLayer(DeviationOf.BOTH),
    SelectorName.GRADUAL: GradualFiltering,
    SelectorName.CACHE_CRAFT: lambda num_layers: CacheCraft(),
    SelectorName.QUESTION: lambda num_layers: QuestionAttention(),
    SelectorName.TWO_ROUNDS: lambda num_layers: TwoRounds(),
}


def make_selector(name: str, num_layers: int) -> TokenSelector:
    """Return the selector `name` for a model of `num_layers` layers.

    Raises:
        KVCacheError: there is no such selector.
    """
    if name not in list(SelectorName):
        raise KVCacheError(f"there is no token selector {name!r}; there are {', '.join(SelectorName)}")
    return SELECTORS[SelectorName(name)](num_layers)
