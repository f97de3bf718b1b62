"""Runs launches of the Triton kernels on CPU tensors by Triton's interpreter, in this process, every access checked.

Triton decides when a function is defined whether it will be compiled or interpreted. So the kernels' source is loaded
a second time, as a module of its own, with interpretation on; the package's copy stays compilable. A changed source
can be loaded the same way, which is how planted bugs get in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor
from triton import knobs
from triton import language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from rtl_kernels.backends.triton_kernels import launch
from rtl_kernels.backends.triton_kernels.configs import Config, Problem
from rtl_kernels.backends.triton_kernels.launch import Launch, Target

SOURCE = Path(launch.__file__).with_name("kernels.py")
_numbers = itertools.count()


def load(path: Path = SOURCE) -> ModuleType:
    """The kernels of a source file, to be interpreted."""
    spec = importlib.util.spec_from_file_location(f"interpreted_kernels_{next(_numbers)}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    before = knobs.runtime.interpret
    knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(module)
    finally:
        knobs.runtime.interpret = before
    return module


class OutOfBoundsError(AssertionError):
    """A kernel touched memory that no argument of its launch covers."""


def run(kernels: ModuleType, step: Launch, extra: list[tuple[int, int]] | None = None) -> None:
    """Execute one launch; `extra` are address ranges that it may touch beside its tensors."""
    tensors = [v for v in step.arguments.values() if isinstance(v, Tensor)]
    allowed = [(t.data_ptr(), t.data_ptr() + _extent(t)) for t in tensors] + (extra or [])
    kernel = getattr(kernels, step.kernel)
    with _checked(kernel, allowed), np.errstate(over="ignore", invalid="ignore"):
        kernel[step.grid](**step.arguments, **step.constants, num_warps=step.warps, num_stages=step.stages)


def target(kernels: ModuleType, block_o: int = 16, block_r: int | None = None, block_k: int = 32) -> Target:
    """A target with small tiles, so that small shapes have many of them and ragged edges; planes get wider ones."""

    def choose(problem: Problem) -> Config:
        return Config(block_o, block_r or (16 if problem.kind == "rows" else 64), block_k, 4, 1)

    return Target(lambda step: run(kernels, step), 80, choose=choose)


def table(kernels: ModuleType, architecture: int = 80, tf32: bool = False) -> Target:
    """A target with the configurations that a GPU would get."""
    return Target(lambda step: run(kernels, step), architecture, tf32)


def _extent(t: Tensor) -> int:
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


@contextlib.contextmanager
def _checked(kernel: Any, allowed: list[tuple[int, int]]) -> Iterator[None]:
    builder = type(interpreter.interpreter_builder)
    loads, stores, call = builder.create_masked_load, builder.create_masked_store, JITFunction.__call__

    def check(pointers: Any, mask: Any, size: int) -> None:
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        at = pointers.data[active].astype(np.int64)
        inside = np.zeros(at.shape, dtype=bool)
        for low, high in allowed:
            inside |= (at >= low) & (at + size <= high)
        if not inside.all():
            raise OutOfBoundsError(f"{int((~inside).sum())} of {at.size} accesses lie in no argument's memory")

    # Where one side of a comparison is a scalar, Triton 3.9 goes on counting its result as 32-bit integers, which its
    # own loads and stores then refuse.
    def boolean(mask: Any) -> Any:
        return interpreter.TensorHandle(mask.data.astype(bool), tl.int1)

    def masked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        mask = boolean(mask)
        check(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
        return loads(self, pointers, mask, *args)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        mask = boolean(mask)
        check(pointers, mask, value.data.dtype.itemsize)
        return stores(self, pointers, value, mask, *args)

    # Triton's own library functions (tl.sum, ...) were defined for compilation: interpret their source as well.
    def library(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return interpreter.InterpretedFunction(self.fn)(*args, **kwargs)

    options = interpreter.interpreter_builder.options
    builder.create_masked_load, builder.create_masked_store, JITFunction.__call__ = masked_load, masked_store, library
    # Every function called by a kernel would patch the language anew, most of the time it takes, and leave it so: the
    # language is patched here, once as the kernels see it and once as the library does, and mended at the end.
    patch = interpreter._patch_lang
    scopes = [patch(function) for function in (kernel.fn, tl.standard.sum.fn)]
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        for scope in reversed(scopes):
            scope.restore()
        interpreter.interpreter_builder.options = options
        builder.create_masked_load, builder.create_masked_store, JITFunction.__call__ = loads, stores, call
