import dataclasses
import subprocess
import sys

import pytest
import torch
from kv_samples import CONFIG

from ragkit.config import CodecName
from ragkit.kvcache.codecs import make_codec
from ragkit.kvcache.kv_size import estimated_kv_bytes
from ragkit.kvcache.layout import KVLayout


@pytest.mark.parametrize("codec", CodecName)
@pytest.mark.parametrize(("layers", "heads", "head_dim"), [(30, 3, 64), (32, 8, 128), (12, 2, 96)])
def test_the_estimate_is_that_of_the_codec(codec, layers, heads, head_dim):
    config = dataclasses.replace(CONFIG, num_layers=layers, num_kv_heads=heads, head_dim=head_dim)
    exact = make_codec(codec.value, KVLayout.of(config, torch.bfloat16)).bytes_per_token(200)
    assert estimated_kv_bytes(codec, config, 0, 200_000) == pytest.approx(200_000 * exact, rel=0.02)


def test_a_million_tokens_of_the_bundled_model_take_23_gigabytes():
    config = dataclasses.replace(CONFIG, num_layers=30, num_kv_heads=3, head_dim=64)
    assert estimated_kv_bytes(CodecName.BF16, config, 5000, 1_000_000) == pytest.approx(23e9, rel=0.01)


def test_estimating_loads_no_torch():
    code = "import sys, ragkit.kvcache.kv_size; print(sorted(sys.modules.keys() & {'torch', 'numpy'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
