import pytest
import torch

from ragkit.kvcache.channel_steps import channel_steps, relative_steps


def layers_of(count=12, key_scale=1.0, value_scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(200, 2, 32, generator=generator) * key_scale,
            torch.randn(200, 2, 32, generator=generator) * value_scale,
        )
        for _ in range(count)
    ]


def test_all_steps_grow_with_the_coarseness():
    layers = layers_of()
    for fine, coarse in zip(channel_steps(layers, 0.5), channel_steps(layers, 1.0), strict=True):
        torch.testing.assert_close(2 * fine, coarse)


def test_numbers_of_equal_spread_have_the_relative_steps():
    layers = layers_of()
    for index, (keys, values) in enumerate(channel_steps(layers, 0.5)):
        expected_keys, expected_values = relative_steps(index, len(layers), 32, 0.5)
        torch.testing.assert_close(keys.mean(0), expected_keys, rtol=0.1, atol=0)
        torch.testing.assert_close(values.mean(), torch.tensor(expected_values), rtol=0.1, atol=0)


def test_keys_of_slow_pairs_have_the_finer_steps():
    keys, _ = relative_steps(0, 12, 64, 1.0)
    assert torch.equal(keys[:32], keys[32:])
    assert bool((keys[:31] > keys[1:32]).all())
    assert float(keys[0] / keys[31]) == pytest.approx(2**3.45)


def test_values_of_the_lower_third_have_half_steps():
    steps = [relative_steps(layer, 13, 64, 1.0)[1] for layer in range(13)]
    assert steps[:5] == [0.5] * 5
    assert steps[6:] == [1.0] * 7
    assert 0.5 < steps[5] < 1.0


def test_scaling_all_keys_scales_their_steps_and_no_others():
    plain, scaled = (channel_steps(layers_of(key_scale=scale), 0.5) for scale in (1.0, 8.0))
    for (keys, values), (scaled_keys, scaled_values) in zip(plain, scaled, strict=True):
        torch.testing.assert_close(8 * keys, scaled_keys)
        assert torch.equal(values, scaled_values)


def test_a_head_of_larger_keys_gets_no_larger_steps_than_the_others():
    layers = layers_of()
    layers[3][0][:, 1] *= 10
    keys = channel_steps(layers, 0.5)[3][0]
    assert float(keys[1].mean() / keys[0].mean()) == pytest.approx(1, abs=0.1)


def test_a_head_of_larger_values_gets_steps_in_proportion():
    layers = layers_of()
    layers[3][1][:, 1] *= 10
    values = channel_steps(layers, 0.5)[3][1]
    assert float(values[1].mean() / values[0].mean()) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("tokens", [0, 1])
def test_numbers_without_spread_have_steps_of_zero(tokens):
    layers = [(torch.ones(tokens, 2, 8), torch.ones(tokens, 2, 8))]
    assert float(channel_steps(layers, 0.5)[0].abs().max()) == 0
