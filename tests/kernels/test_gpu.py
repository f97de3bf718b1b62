"""What a GPU's owner has to be sure of beside the numbers: a step looks at nothing on the device, so that the host
never waits, and it can be captured in a CUDA graph. Without a GPU the first half is shown on tensors without values.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import rtl_kernels as rk
from rtl_kernels import ops, testing
from rtl_kernels.backends.triton_kernels import launch
from rtl_kernels.backends.triton_kernels.launch import Launch, Target

NAMES = ("linear-ragged", "linear-untied", "conv2d-depthwise", "conv2d-ragged", "conv_transpose2d-ragged")
CASES = [case for case in testing.CASES if str(case) in NAMES]
# stride, padding, ... of the raw operators, by the groups of a convolution
GEOMETRY = {
    "conv2d": lambda groups: ([2, 1], [1, 1, 1, 1], [1, 1], groups),
    "conv_transpose2d": lambda groups: ([2, 1], [1, 1], [1, 0], 1, [1, 1]),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_the_cases_are_there():
    assert len(CASES) == len(NAMES)


def test_a_tensor_without_values_tells_who_looks():
    """The check is checked: the debug switch for indices on a device does look."""
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.empty(3, dtype=torch.int64, device="cuda").tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_routing_and_launching_look_at_no_value_on_the_device(case):
    """From an index on a GPU to the launches of forward, dX and dW."""
    launches: list[Launch] = []
    target = Target(launches.append, 90)
    operation = "masked_" + case.operation
    geometry = GEOMETRY[case.operation](case.x[1] // case.weight[1]) if len(case.x) == 4 else ()
    with FakeTensorMode():

        def empty(*size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device="cuda")

        order, offsets, ascending = ops._route(empty(len(case.index), dtype=torch.int64), case.num_masks)
        ops._refuse_dense(ascending, offsets, "it")
        x, weight = empty(*case.x), empty(*((case.num_masks,) if case.untied else ()), *case.weight)
        words = empty(*rk.masks.words_shape(case.num_masks, case.weight), dtype=torch.int32)
        routing = words, offsets, order, 1
        y = launch.OPERATIONS[operation](target, x, weight, *routing, None, *geometry)
        dx_size = (x.shape,) if geometry else ()
        dx = launch.OPERATIONS[f"{operation}_grad_input"](target, y, weight, *routing, *dx_size, *geometry)
        dw, _ = launch.OPERATIONS[f"{operation}_grad_weight"](target, y, x, *routing, weight.shape, True, *geometry)
    assert (dx.shape, dw.shape) == (x.shape, weight.shape)
    assert {"correlate", "adjoint", "weight_grad"} <= {step.kernel for step in launches}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_is_captured_and_replayed_with_other_samples_and_another_index(case, backend):
    """Capturing refuses whatever waits for the device. The replay gives the bits of the same step run eagerly."""
    example = testing.make(case, torch.float16, "cuda")
    testing.skip_if_refused(example, backend)
    index = torch.tensor(case.index, device="cuda")
    weight = example.weight.clone().requires_grad_()
    x = example.x.clone().requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        route = rk.Route.build(index, case.num_masks)
        y = example.function(x, weight, example.bank, route, example.bias, **case.options, backend=backend)
        return y, *torch.autograd.grad(y, (x, weight), example.dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles and loads what a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        index.copy_(index.roll(1))
        x.copy_(testing.make(case, torch.float16, "cuda", seed=1).x)
    graph.replay()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(captured, eager, strict=True):
        testing.assert_bitwise(a, b)
