"""What a mixed batch of masked samples can be computed with: ours, and everything else PyTorch offers.

Each contender is a function of a `Problem` that prepares what does not change from call to call and returns the call,
or raises `SkippedError` with the reason. In training a call is the forward pass and the gradients of input and weight.
What is prepared for a batch (our route, the positions others sort by) is prepared for all who can use it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import rtl_kernels as rk
from benchmarks.cases import Case
from benchmarks.timing import Run, SkippedError
from rtl_kernels import testing

MEMORY_LIMIT = 2 << 30  # bytes a contender may hold beside what every contender holds


class Problem:
    """One case at one sparsity: the tensors, and what they have to give.

    Args:
        training: gradients of x and weight are wanted too.
    """

    def __init__(self, case: Case, sparsity: float, training: bool, seed: int = 0) -> None:
        self.case, self.training = case, training
        x, weight, self.masks, self.bank, self.route = case.make(sparsity, seed)
        self.x, self.weight = x.requires_grad_(training), weight.requires_grad_(training)
        self.order = torch.arange(case.batch) if self.route.order is None else self.route.order
        self.index = torch.empty_like(self.order).index_copy_(0, self.order, self.route.index)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + 1)
            self.dy = torch.randn(self.dense(x, weight).shape, generator=generator)

    def dense(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.case.dense(x, weight, None, **self.case.options)

    @cached_property
    def values(self) -> Tensor:
        """The masks as float32 (K, *weight.shape), to multiply weights by."""
        return self.masks.float()

    @property
    def groups(self) -> int:
        groups: int = self.case.options.get("groups", 1)
        return groups

    @property
    def columns(self) -> int:
        """Inputs of one output: columns of the weight as a matrix."""
        return self.weight[0].numel()

    def unfold(self, x: Tensor) -> Tensor:
        """(n, ...) -> (n, groups · columns, output pixels); a linear layer has one pixel."""
        if self.case.dense is F.linear:
            return x[:, :, None]
        options = {key: value for key, value in self.case.options.items() if key != "groups"}
        return F.unfold(x, self.case.weight[2:], **options)

    def fold(self, y: Tensor) -> Tensor:
        """(n, outputs, pixels) -> (n, *shape of a sample's output)."""
        return y.reshape(y.shape[0], *self.dy.shape[1:])

    def refuse_above_limit(self, elements: int, what: str) -> None:
        """Raise SkippedError if so many float32 do not fit into the memory limit."""
        if 4 * elements > MEMORY_LIMIT:
            raise SkippedError(f"{what} would take {4 * elements / 2**30:.1f} GiB, over {MEMORY_LIMIT >> 30} GiB")


@dataclass(frozen=True)
class Call:
    """A contender made ready: `forward` gives y; in training y is differentiated for the problem's x and `weight`.

    `computes` names what it has to give: "masked"; "dense": the batch without masks; "untied": the same as masked, and
    gradients of K weights of their own.
    """

    forward: Callable[[], Tensor]
    weight: Tensor
    computes: str = "masked"


Contender = Callable[[Problem], Call]


def dense(p: Problem) -> Call:
    """the layer without masks, one call for the whole batch"""
    return Call(lambda: p.dense(p.x, p.weight), p.weight, "dense")


def ours(p: Problem) -> Call:
    """the masked operator of this package, the batch's route made before"""
    return Call(lambda: p.case.operator(p.x, p.weight, p.bank, p.route, **p.case.options), p.weight)


def ours_and_route(p: Problem) -> Call:
    """ours, the route made anew in every call"""

    def forward() -> Tensor:
        route = rk.Route.build(p.index, p.case.masks)
        return p.case.operator(p.x, p.weight, p.bank, route, **p.case.options)

    return Call(forward, p.weight)


def loop(p: Problem) -> Call:
    """for each mask, its samples through `weight * mask`"""

    def forward() -> Tensor:
        y = torch.empty(p.dy.shape)
        for k in range(p.case.masks):
            where = p.index == k
            y[where] = p.dense(p.x[where], p.weight * p.values[k])
        return y

    return Call(forward, p.weight)


def loop_cached(p: Problem) -> Call:
    """the same with the K masked weights kept from call to call (inference)"""
    if p.training:
        raise SkippedError("masked weights change with every training step: nothing to cache")
    weights = p.weight * p.values

    def forward() -> Tensor:
        y = torch.empty(p.dy.shape)
        for k in range(p.case.masks):
            where = p.index == k
            y[where] = p.dense(p.x[where], weights[k])
        return y

    return Call(forward, p.weight)


def compiled_loop(p: Problem) -> Call:
    """torch.compile of the loop as one graph, for this batch's group sizes, the positions of each group made before"""
    if shutil.which("g++") is None:
        raise SkippedError("torch.compile needs a C++ compiler (g++)")
    where = [(p.index == k).nonzero()[:, 0] for k in range(p.case.masks)]
    # Given as arguments: dense's operator and options are constants of the graph, and a boolean mask would break it.
    function, options, shape = p.case.dense, p.case.options, p.dy.shape

    def whole(x: Tensor, weight: Tensor, values: Tensor, where: list[Tensor]) -> Tensor:
        y = x.new_empty(shape)
        for k, rows in enumerate(where):
            y = y.index_copy(0, rows, function(x[rows], weight * values[k], None, **options))
        return y

    torch.compiler.reset()
    compiled = torch.compile(whole, fullgraph=True, dynamic=False)
    call = Call(lambda: compiled(p.x, p.weight, p.values, where), p.weight)
    try:
        _run(p, call)()
    except AssertionError as error:  # the code it makes looks at the strides of what PyTorch's own operators give
        raise SkippedError(f"torch.compile's code fails: {str(error).splitlines()[0]}") from error
    return call


def untied(p: Problem) -> Call:
    """K dense weights instead of one with masks: the batch sorted, each ticket's part through its own weight"""
    weights = (p.weight * p.values).detach().requires_grad_(p.training)
    back = torch.empty_like(p.order).index_copy_(0, p.order, torch.arange(p.case.batch))

    def forward() -> Tensor:
        x = p.x.index_select(0, p.order)
        parts = [p.dense(x[start:stop], weights[k]) for k, start, stop in p.route.segments]
        return torch.cat(parts).index_select(0, back)

    return Call(forward, weights, "untied")


def gathered_bmm(p: Problem) -> Call:
    """a masked weight for every sample, gathered by its index, in one batched matrix product"""
    gathered = p.case.batch * p.weight.numel()
    p.refuse_above_limit(gathered * (2 if p.training else 1), "a weight for every sample")

    def forward() -> Tensor:
        weights = (p.weight * p.values)[p.index].reshape(p.case.batch, p.groups, -1, p.columns)
        x = p.unfold(p.x).reshape(p.case.batch, p.groups, p.columns, -1)
        return p.fold(weights @ x)

    return Call(forward, p.weight)


def vmap(p: Problem) -> Call:
    """torch.vmap over samples, each with its mask"""
    gathered = p.case.batch * p.weight.numel()
    p.refuse_above_limit(gathered * (3 if p.training else 2), "a mask and a weight for every sample")
    each = torch.vmap(lambda x, mask: p.dense(x, p.weight * mask))
    return Call(lambda: each(p.x, p.values[p.index]), p.weight)


def grouped_convolution(p: Problem) -> Call:
    """the K tickets as groups of one convolution, each ticket's samples padded to the largest group"""
    masks, groups = p.case.masks, p.groups
    sizes = torch.bincount(p.index, minlength=masks)
    largest = int(sizes.max())
    begin = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    slot = torch.empty_like(p.index)  # where a sample lies among K · largest places
    slot[p.order] = p.route.index * largest + torch.arange(p.case.batch) - begin[p.route.index]
    p.refuse_above_limit(masks * largest * (p.x[0].numel() + p.dy[0].numel()), "the padded batch")

    def forward() -> Tensor:
        x = p.x.new_zeros(masks * largest, *p.x.shape[1:]).index_copy(0, slot, p.x)
        x = x.unflatten(0, (masks, largest)).transpose(0, 1).flatten(1, 2)  # (largest, K · channels, ...)
        weights = (p.weight * p.values).flatten(0, 1)
        if p.case.dense is F.linear:
            y = F.conv1d(x[:, :, None], weights[:, :, None], groups=masks)[:, :, 0]
        else:
            y = F.conv2d(x, weights, None, **{**p.case.options, "groups": masks * groups})
        return y.unflatten(1, (masks, -1)).transpose(0, 1).flatten(0, 1).index_select(0, slot)

    return Call(forward, p.weight)


def csr(p: Problem) -> Call:
    """for each mask, its samples (unfolded) through a sparse matrix in torch's CSR layout, made before in inference"""
    outputs = p.weight.shape[0]
    shape = (outputs, p.groups * p.columns)
    structure = []
    for mask in p.masks:
        row, column = mask.reshape(outputs, p.columns).nonzero(as_tuple=True)
        position = row * p.columns + column
        begin = F.pad(torch.bincount(row, minlength=outputs).cumsum(0), (1, 0))
        structure.append((begin, column + row // (outputs // p.groups) * p.columns, position))

    def matrix(k: int) -> Tensor:
        begin, column, position = structure[k]
        return torch.sparse_csr_tensor(begin, column, p.weight.flatten()[position], shape, check_invariants=False)

    matrices = None if p.training else [matrix(k) for k in range(p.case.masks)]

    def forward() -> Tensor:
        y = torch.empty(p.dy.shape)
        for k in range(p.case.masks):
            where = p.index == k
            columns = p.unfold(p.x[where])  # (n, inputs, pixels)
            n, inputs, pixels = columns.shape
            sparse = matrix(k) if matrices is None else matrices[k]
            out = torch.sparse.mm(sparse, columns.transpose(0, 1).reshape(inputs, n * pixels))
            y[where] = p.fold(out.reshape(outputs, n, pixels).transpose(0, 1))
        return y

    return Call(forward, p.weight)


CONTENDERS: dict[str, Contender] = {
    "dense": dense,
    "ours": ours,
    "ours + route": ours_and_route,
    "loop": loop,
    "loop, cached": loop_cached,
    "compiled loop": compiled_loop,
    "untied": untied,
    "grouped conv": grouped_convolution,
    "CSR": csr,
    "gathered bmm": gathered_bmm,
    "vmap": vmap,
}


class Expected:
    """What each kind of contender has to give, from dense passes in float64, and how far from it one may be.

    Float32 sums of n terms, in whatever order, are off by about √n · u · Σ|terms| at most (N. Higham, T. Mary, "A new
    approach to probabilistic rounding error analysis", 2019; u = 2⁻²⁴); twice that is allowed, element by element. It
    tells a wrong mask from rounding. How exact our operators are among themselves is for the tests of the kernels.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._known: dict[str, tuple[testing.Results, testing.Results]] = {}

    def check(self, name: str, call: Call) -> None:
        """Run a contender once. Raises AssertionError if what it gives is wrong."""
        p = self.problem
        exact, terms = self._of(call.computes)
        y = call.forward()
        _check(f"{name}: y", y, exact.y, terms.y, p.columns)
        if p.training:
            pixels = p.dy[0, 0].numel() if p.dy.dim() == 4 else 1
            taps = p.weight[0, 0].numel()
            dx, dw = torch.autograd.grad(y, [p.x, call.weight], p.dy)
            _check(f"{name}: dx", dx, exact.x, terms.x, p.weight.shape[0] // p.groups * taps)
            _check(f"{name}: dW", dw, exact.weight, terms.weight, p.case.batch * pixels)

    def _of(self, computes: str) -> tuple[testing.Results, testing.Results]:
        if computes not in self._known:
            example = self._example(computes)
            with torch.set_grad_enabled(self.problem.training):
                exact, terms = (testing.separate_passes(example, torch.float64, absolute=a) for a in (False, True))
            self._known[computes] = exact, terms
        return self._known[computes]

    def _example(self, computes: str) -> testing.Example:
        p = self.problem
        weight, masks, index = p.weight.detach(), p.masks, p.index
        if computes == "dense":
            index = torch.full_like(index, -1)
        elif computes == "untied":
            weight, masks = weight * masks, torch.ones_like(masks)
        case = testing.Case(
            p.case.name,
            "linear" if p.case.dense is F.linear else "conv2d",
            tuple(p.x.shape),
            p.case.weight,
            tuple(index.tolist()),
            p.case.masks,
            untied=computes == "untied",
            bias=False,
            options=p.case.options,
        )
        return testing.Example(case, p.x.detach(), weight, masks, p.bank, p.route, None, p.dy)


def _check(name: str, actual: Tensor, exact: Tensor, terms: Tensor, count: int) -> None:
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual = actual.detach()
    excess = (actual.double() - exact).abs() - 2 * count**0.5 * 2**-24 * terms
    wrong = ~(excess <= 0)  # a NaN is wrong
    if wrong.any():
        worst = int(excess.argmax())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong, the worst is "
            f"{float(actual.flatten()[worst])} where {float(exact.flatten()[worst])} is right"
        )


def build(problem: Problem, names: Iterable[str] = CONTENDERS) -> tuple[dict[str, Run], dict[str, str]]:
    """The calls to be timed, each checked against float64 first, and why the others are not.

    Raises:
        AssertionError: a contender's result is wrong.
    """
    expected = Expected(problem)
    runs: dict[str, Run] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            call = CONTENDERS[name](problem)
        except SkippedError as reason:
            skipped[name] = str(reason)
            continue
        expected.check(name, call)
        runs[name] = _run(problem, call)
    return runs, skipped


def _run(problem: Problem, call: Call) -> Run:
    """What is timed: the forward pass, in training with the gradients."""
    if not problem.training:
        return call.forward
    leaves = [problem.x, call.weight]
    return lambda: torch.autograd.grad(call.forward(), leaves, problem.dy)
