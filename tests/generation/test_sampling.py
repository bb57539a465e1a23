import pytest
import torch

from ragkit.errors import ConfigError
from ragkit.generation.sampling import Sampler, SamplingConfig, distribution

LOGITS = torch.log(torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05]))


def _counts(config: SamplingConfig, draws: int = 20_000) -> torch.Tensor:
    sampler = Sampler(config)
    drawn = torch.tensor([sampler.next(LOGITS) for _ in range(draws)])
    return torch.bincount(drawn, minlength=5) / draws


def test_greedy_takes_the_most_likely_token():
    assert Sampler(SamplingConfig()).next(LOGITS) == 0


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.69), (1.0, 0.71), (0.7, 0.9)]
)
def test_tokens_are_drawn_with_the_stated_probabilities(temperature, top_p):
    config = SamplingConfig(temperature=temperature, top_p=top_p, seed=3)
    # The standard deviation of a frequency over 20,000 draws is at most 0.0036.
    assert float((_counts(config) - distribution(LOGITS, config)).abs().max()) < 0.015


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    kept = distribution(LOGITS, SamplingConfig(temperature=1.0, top_p=0.69))
    torch.testing.assert_close(kept, torch.tensor([4 / 7, 0, 3 / 7, 0, 0], dtype=torch.float64))


def test_a_tiny_top_p_is_greedy():
    sampler = Sampler(SamplingConfig(temperature=5.0, top_p=1e-9))
    assert {sampler.next(LOGITS) for _ in range(50)} == {0}


def test_temperature_is_a_division_of_the_logits():
    hot = distribution(LOGITS, SamplingConfig(temperature=2.0))
    torch.testing.assert_close(hot, (LOGITS.double() / 2).softmax(0))


def test_equal_seeds_draw_equal_tokens_and_others_do_not():
    def drawn(seed):
        sampler = Sampler(SamplingConfig(temperature=1.0, seed=seed))
        return [sampler.next(LOGITS) for _ in range(50)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"seed": 2**64}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
