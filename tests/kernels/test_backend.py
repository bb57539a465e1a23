import importlib.util
import sys

import pytest
import torch

from ragkit.errors import KernelUnavailableError
from ragkit.kernels import backend as installed
from ragkit.kernels.backend import Backend, can_launch_early, ceil_div, next_power_of_2, resolve_backend


def test_a_cpu_tensor_takes_torch_unless_told_otherwise():
    assert resolve_backend(torch.ones(1)) is Backend.TORCH


def test_triton_on_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(KernelUnavailableError, match="set TRITON_INTERPRET=1"):
        resolve_backend(torch.ones(1), Backend.TRITON)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr("ragkit.kernels.backend.TRITON_INSTALLED", False)
    with pytest.raises(KernelUnavailableError, match=r"install triton>=3\.6"):
        resolve_backend(torch.ones(1), Backend.TRITON)


def test_kernels_are_defined_without_triton_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("backend_without_triton", installed.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def kernel():
        """Stand for a kernel."""

    assert not module.TRITON_INSTALLED
    assert module.jit(kernel) is kernel
    assert module.jit(do_not_specialize=("size",))(kernel) is kernel


@pytest.mark.parametrize(
    ("device", "hip", "capability", "expected"),
    [
        ("cuda", None, (9, 0), True), ("cuda", None, (12, 0), True), ("cuda", None, (8, 9), False),
        ("cuda", "6.4", (9, 4), False), ("cpu", None, (9, 0), False),
    ],
)  # fmt: skip
def test_kernels_are_launched_early_from_compute_capability_9_on(device, hip, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_launch_early.__wrapped__(torch.device(device)) is expected


@pytest.mark.parametrize(("number", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_next_power_of_two(number, expected):
    assert next_power_of_2(number) == expected


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_division_rounds_up(number, expected):
    assert ceil_div(number, 64) == expected
