import pytest
import torch

from ragkit.kernels import launched
from ragkit.kernels.launched import LaunchedKernel


class Source:
    """Stands in for Triton: counts what is bound anew, and gives a compiled kernel that records its launches."""

    def __init__(self):
        self.bound, self.launches = [], []

    def __getitem__(self, grid):
        def bind(*arguments, **constants):
            self.bound.append((grid, arguments, constants))
            return Compiled(self.launches)

        return bind


class Compiled:
    """A compiled kernel with what Triton's launcher takes: `launches` is what was asked of it, `heard` by `[grid]`."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, launches):
        self.launches = launches

    def run(self, *given):
        grid, (stream, function, metadata, *for_listeners), arguments = given[:3], given[3:9], given[9:]
        assert (stream, function, metadata) == ("stream of 0", "function", "metadata")
        assert for_listeners == [None, None, None]
        self.launches.append((grid, arguments))

    def __getitem__(self, grid):
        return lambda *arguments: self.launches.append(("heard", grid, arguments))


class OnGPU(torch.Tensor):
    def get_device(self):
        return 0


def _kernel(pointer, count, step, scale, WIDE, BLOCK):
    pass


@pytest.fixture
def kernel(monkeypatch):
    source = Source()
    monkeypatch.setattr(launched, "jit", lambda function, **options: source)
    monkeypatch.setattr(launched, "_current_stream", "stream of {}".format)
    if not launched.TRITON_INSTALLED:
        monkeypatch.setattr(launched, "_is_watched", lambda: False)
    return LaunchedKernel(_kernel, ("count",)), source


def _pointer(dtype=torch.float32, offset=0):
    return torch.zeros(64, dtype=dtype)[offset:].as_subclass(OnGPU)


def test_the_second_launch_of_a_kind_goes_to_the_compiled_kernel_with_constants_in_the_order_of_the_parameters(kernel):
    launch, source = kernel
    launch[(3,)](_pointer(), 5, 16, 0.5, BLOCK=64, WIDE=True, num_warps=4)
    second = _pointer()
    launch[(7, 2)](second, 9, 32, 0.25, BLOCK=64, WIDE=True, num_warps=4)
    assert len(source.bound) == 1
    ((grid, arguments),) = source.launches
    assert grid == (7, 2, 1)
    assert arguments[0] is second
    assert arguments[1:] == (9, 32, 0.25, True, 64)


@pytest.mark.parametrize(
    ("arguments", "constants"),
    [
        ((_pointer(torch.bfloat16), 5, 16, 0.5), {}),
        ((_pointer(offset=1), 5, 16, 0.5), {}),  # 4 bytes off an aligned place
        ((_pointer(), 1 << 40, 16, 0.5), {}),
        ((_pointer(), 5, 17, 0.5), {}),
        ((_pointer(), 5, 1, 0.5), {}),
        ((_pointer(), 5, 16, 0.5), {"BLOCK": 128}),
        ((_pointer(), 5, 16, 0.5), {"num_warps": 8}),
    ],
)
def test_what_triton_would_compile_anew_is_bound_anew(kernel, arguments, constants):
    launch, source = kernel
    usual = {"BLOCK": 64, "WIDE": True, "num_warps": 4}
    launch[(3,)](_pointer(), 5, 16, 0.5, **usual)
    launch[(3,)](*arguments, **(usual | constants))
    assert len(source.bound) == 2


@pytest.mark.skipif(not launched.TRITON_INSTALLED, reason="Triton is not installed")
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_while_a_profiler_listens_launches_go_the_way_that_tells_it(kernel, hook, monkeypatch):
    launch, source = kernel
    for _ in range(2):
        launch[(3,)](_pointer(), 5, 16, 0.5, BLOCK=64, WIDE=True)
    monkeypatch.setattr(launched.knobs.runtime, hook, lambda metadata: None)
    launch[(3,)](_pointer(), 5, 16, 0.5, BLOCK=64, WIDE=True)
    monkeypatch.setattr(launched.knobs.runtime, hook, None)
    launch[(3,)](_pointer(), 5, 16, 0.5, BLOCK=64, WIDE=True)
    assert [len(entry) for entry in source.launches] == [2, 3, 2]


def test_tensors_of_one_type_and_alignment_share_a_kernel(kernel):
    launch, source = kernel
    for pointer in (_pointer(), _pointer(), _pointer(offset=1), _pointer(offset=1)):
        launch[(3,)](pointer, 5, 16, 0.5, BLOCK=64, WIDE=True)
    assert len(source.bound) == 2


def test_values_of_a_shared_integer_share_a_kernel(kernel):
    launch, source = kernel
    for count in (1, 5, 16):
        launch[(3,)](_pointer(), count, 16, 0.5, BLOCK=64, WIDE=True)
    assert len(source.bound) == 1


def test_on_a_cpu_the_interpreter_gets_every_launch(kernel):
    launch, source = kernel
    for _ in range(2):
        launch[(3,)](torch.zeros(4), 5, 16, 0.5, BLOCK=64, WIDE=True)
    assert len(source.bound) == 2
