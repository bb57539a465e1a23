"""Kernels that are launched often: the compiled form is kept under a short key, so that a launch costs little.

Triton binds and specialises every argument anew at each launch, tens of microseconds of Python; a prefill over cached
chunks launches hundreds of small kernels, and the GPU would wait for them. Here the first launch of each combination of
types goes through Triton, which returns the compiled kernel; later ones go to that kernel directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ragkit.kernels.backend import jit

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
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches the kernel over `grid`."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        device = arguments[0].get_device()
        if device < 0:  # interpreted
            self.source[grid](*arguments, **constants)
            return
        key = (device, *map(_kind, arguments, self._shares), *constants.values())
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self.source[grid](*arguments, **constants)
            return
        values = [constants[name] for name in self._names[len(arguments) :]]
        compiled[(*grid, 1, 1)[:3]](*arguments, *values)


def launched(function: Any = None, *, do_not_specialize: tuple[str, ...] = ()) -> Any:
    """Return `function` as a `LaunchedKernel`; a decorator, with or without arguments."""
    if function is None:
        return partial(launched, do_not_specialize=do_not_specialize)
    return LaunchedKernel(function, do_not_specialize)


def _kind(argument: Any, shares: bool) -> Any:
    """Return what Triton compiles an argument for: equal kinds share a compiled kernel."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT == 0
    if isinstance(argument, float | bool):
        return type(argument)
    if isinstance(argument, int):
        fits = -_INT32 <= argument < _INT32
        return fits if shares else (fits, argument == 1, argument % _ALIGNMENT == 0)
    if argument is None:
        return None
    # a descriptor of tiles (`backend.tiles_of_rows`)
    return argument.base.dtype, tuple(argument.block_shape)
