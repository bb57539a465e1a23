from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ragkit.errors import ModelError
from ragkit.retrieval.safetensors_map import as_float32, map_tensors


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    values = torch.linspace(-3, 3, 12).reshape(3, 4)
    tensors = {"f32": values, "f16": values.half(), "bf16": values.bfloat16(), "empty": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "w.safetensors", metadata={"format": "pt"})
    return tmp_path / "w.safetensors"


def test_tensors_of_every_float_type_are_read_exactly(weights: Path) -> None:
    values = torch.linspace(-3, 3, 12).reshape(3, 4)
    tensors = map_tensors(weights)
    assert np.array_equal(tensors["f32"], values.numpy())
    assert np.array_equal(as_float32(tensors["f16"]), values.half().float().numpy())
    assert np.array_equal(as_float32(tensors["bf16"]), values.bfloat16().float().numpy())
    assert tensors["empty"].shape == (0, 4)


def test_fp32_is_a_view_that_cannot_be_written(weights: Path) -> None:
    view = as_float32(map_tensors(weights)["f32"])
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


@pytest.mark.parametrize("keep", [0, 4, 20, 200])
def test_a_shortened_file_is_refused(weights: Path, keep: int) -> None:
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelError, match=str(weights)):
        map_tensors(weights)


def test_offsets_beyond_the_file_are_refused(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="fetch the model again"):
        map_tensors(weights)
