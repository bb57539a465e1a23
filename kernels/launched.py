"""Kernels that are launched often: the compiled form is kept under a short key, so that a launch costs little.

Triton binds and specialises every argument anew at each launch, tens of microseconds of Python; a prefill over cached
chunks launches hundreds of small kernels, and the GPU would wait for them. Here the first launch of each combination of
types goes through Triton, which returns the compiled kernel; later ones go to that kernel's launcher directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ragkit.kernels.backend import TRITON_INSTALLED, jit

if TRITON_INSTALLED:
    from triton import knobs

_ALIGNMENT = 16  # bytes of a pointer, and the divisor of an integer, that Triton compiles for specially
_INT32 = 1 << 31


class LaunchedKernel:
    """A Triton kernel, launched as usual: `kernel[grid](*arguments, NAME=constant, ...)`.

    Args:
        function: the kernel's source; its first parameter is a pointer, and constants come after all others.
        do_not_specialize: integer parameters of which all values share one compilation.
    """

    def __init__(self, function: Any, do_not_specialize: tuple[str, ...]) -> None:
        self.source = jit(function, do_not_specialize=do_not_specialize) if do_not_specialize else jit(function)
        self.__doc__ = function.__doc__
        code = function.__code__
        self._names: tuple[str, ...] = code.co_varnames[: code.co_argcount]
        self._shares = tuple(name in do_not_specialize for name in self._names)
        self._compiled: dict[tuple[Any, ...], _Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches the kernel over `grid`."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        if device < 0:  # interpreted
            self.source[grid](*arguments, **constants)
            return
        kinds = [
            value.dtype if type(value) is Tensor and not value.data_ptr() % _ALIGNMENT else _kind(value, shares)
            for value, shares in zip(arguments, self._shares, strict=False)  # constants follow
        ]
        key = (device, *kinds, *constants.values())
        launch = self._compiled.get(key)
        if launch is None:
            compiled = self.source[grid](*arguments, **constants)
            self._compiled[key] = _Launch(compiled, [constants[name] for name in self._names[len(arguments) :]])
            return
        launch.over(grid, device, arguments)


class _Launch:
    """What is the same for all launches of one compiled kernel; it was launched once, so that it is loaded.

    Args:
        compiled: the kernel, as Triton returns it.
        constants: the values of its constants, in the order of the parameters.
    """

    __slots__ = ("_compiled", "_constants", "_function", "_metadata", "_run")

    def __init__(self, compiled: Any, constants: list[Any]) -> None:
        self._compiled = compiled
        self._constants = constants
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata

    def over(self, grid: tuple[int, ...], device: int, arguments: tuple[Any, ...]) -> None:
        """Launch the kernel on the current stream."""
        grid = (*grid, 1, 1)[:3]
        if _is_watched():
            self._compiled[grid](*arguments, *self._constants)
            return
        # What `compiled[grid]` comes to, without metadata for listeners and their two hooks.
        self._run(
            *grid, _current_stream(device), self._function, self._metadata, None, None, None,
            *arguments, *self._constants,
        )  # fmt: skip


def launched(function: Any = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """Return `function` as a `LaunchedKernel`; a decorator, with or without arguments."""
    if function is None:
        return partial(launched, do_not_specialize=do_not_specialize)
    return LaunchedKernel(function, do_not_specialize)


def _current_stream(device: int) -> int:
    """Return the handle of torch's current stream on a GPU."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def _is_watched() -> bool:
    """Return whether a profiler of Triton's wants to hear of launches."""
    before, after = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _kind(argument: Any, shares: bool) -> Any:
    """Return what Triton compiles an argument for: equal kinds share a compiled kernel."""
    if isinstance(argument, Tensor):
        return (argument.dtype, False) if argument.data_ptr() % _ALIGNMENT else argument.dtype
    if isinstance(argument, float | bool):
        return type(argument)
    if isinstance(argument, int):
        fits = -_INT32 <= argument < _INT32
        return fits if shares else (fits, argument == 1, argument % _ALIGNMENT == 0)
    if argument is None:
        return None
    # a descriptor of tiles (`backend.tiles_of_rows`)
    return argument.base.dtype, tuple(argument.block_shape)
