"""Copies of converted models for inference: what follows a masked layer is done while its result lies in the caches.

A batch norm with fixed statistics is a scale and a shift of each channel (for each ticket, where it keeps its own), so

    convolution or linear layer → batch norm → + residual → ReLU

is one operator (`masked_..._into` of ops.py), whichever of the three follow. Layers whose results are concatenated
along the channels write them into their places at once. Dense convolutions take their batch norms into their weights.
`torch.fx` finds the patterns; what it finds none in is left as it is.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from . import functional
from .nn import (
    MaskedConv2d,
    MaskedConvTranspose2d,
    MaskedLinear,
    RoutedModel,
    SubsetBatchNorm2d,
    Wrapper,
    _check_routed,
    _Masked,
    _Routed,
)
from .routing import Route
from .shapes import statistics_dtype

__all__ = ["FusedModel", "fuse"]

MaskedLayer = MaskedLinear | MaskedConv2d | MaskedConvTranspose2d


def fuse(net: RoutedModel, *, leaves: Sequence[str] = ()) -> FusedModel:
    """A copy of a converted model for inference, in eval mode, called as `net(x, index)` like the model itself.

    Its results are the model's up to rounding; it has no gradients, and its masks, weights and statistics are those of
    this moment. The model is left as it is.

    Args:
        net: what `convert` returned.
        leaves: names of submodules, as in `net.model.named_modules()`, that `torch.fx` cannot look into. They are
            called as they are, and nothing is fused inside them.

    Raises:
        TypeError: `net` is no `RoutedModel`.
        ValueError: `leaves` names no submodule, or `torch.fx` cannot trace the model (its message says why).
    """
    _check_routed(net)
    root = copy.deepcopy(net).model.eval()
    names = {name for name, _ in root.named_modules()}
    for name in leaves:
        if name not in names:
            raise ValueError(f"leaves holds {name!r}, which is no submodule of the model")
    if isinstance(root, _Masked):
        root = nn.Sequential(root)
    tracer = _Tracer(leaves)
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise ValueError(
            f"torch.fx cannot trace the model: {error}. Name the submodules whose forward depends on values in "
            "leaves=[...], or fuse a model without such control flow"
        ) from error
    model = fx.GraphModule(root, graph, type(root).__name__)
    _drop_identities(model)
    _fold_dense(model)
    _find_points(model)
    _fuse_layers(model)
    _share_concatenations(model)
    model.delete_all_unused_submodules()
    model.recompile()
    return FusedModel(model, net.num_masks)


class FusedModel(Wrapper):
    """A converted model's copy for inference: `net(x, index)`. Made by `fuse`; it has no gradients."""

    def __init__(self, model: nn.Module, num_masks: int) -> None:
        super().__init__(model, num_masks)
        super().train(False)
        self.requires_grad_(False)
        self._own = any(isinstance(module, FusedLayer) and module.own for module in self.modules())

    def train(self, mode: bool = True) -> FusedModel:
        if mode:
            raise ValueError("a fused copy is for inference: train the model it was made from, and fuse that again")
        super().train(False)
        return self

    def _run(self, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._own and x.is_cpu and not torch.compiler.is_compiling() and route.offsets[1] > 0:
            raise ValueError("index holds -1 (no mask), but there are parameters for each ticket: expected 0..K-1")
        with torch.no_grad():
            if not x.is_cpu or route.all_masks or args or kwargs:  # further arguments are in row order
                return super()._run(route, x, *args, **kwargs)
            # The CPU kernels find the samples of a mask wherever they lie: sorting the batch would cost two passes.
            self._pass.enter(route)
            try:
                return self.model(x)
            finally:
                self._pass.enter(None)


class FusedLayer(_Routed, nn.Module):
    """A masked layer and what follows it. Its parameters are buffers: nothing here is trained."""

    weight: Tensor
    mask_words: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: MaskedLayer, norms: Sequence[nn.BatchNorm2d], relu: bool) -> None:
        super().__init__()
        self.num_masks = layer.num_masks
        self.backend = layer.backend
        self.relu = relu
        self.room: tuple[int, int] | None = None  # of the result in a concatenation: first channel, channels in all
        self.pad: tuple[Sequence[int], str] | None = None
        self.geometry: tuple[Any, ...] = ()
        self._known: dict[Any, tuple[int, ...]] = {}
        self._pass = None
        if isinstance(layer, MaskedLinear):
            self.operation = "masked_linear"
            self.out_channels = layer.out_features
        elif isinstance(layer, MaskedConv2d):
            self.operation = "masked_conv2d"
            self.out_channels = layer.out_channels
            padding: Any = layer.padding
            if layer.padding_mode != "zeros":
                self.pad = (layer._reversed_padding_repeated_twice, layer.padding_mode)
                padding = 0
            stride, dilation = list(layer.stride), list(layer.dilation)
            sides = functional._sides(padding, layer.kernel_size, stride, dilation)
            self.geometry = (stride, sides, dilation, layer.groups)
        else:
            self.operation = "masked_conv_transpose2d"
            self.out_channels = layer.out_channels
            pairs = (layer.stride, cast(tuple[int, ...], layer.padding), layer.output_padding)
            self.geometry = (*map(list, pairs), layer.groups, list(layer.dilation))
        scale, shift = _affine(layer.bias, norms)
        wide = statistics_dtype(layer.weight.dtype)
        self.register_buffer("weight", layer.weight.detach())
        self.register_buffer("mask_words", layer.mask_words)
        self.register_buffer("scale", None if scale is None else scale.to(wide))
        self.register_buffer("shift", None if shift is None else shift.to(wide))

    @property
    def own(self) -> bool:
        """Whether a parameter is there for each mask, so that none is there for samples without one."""
        untied = self.weight.dim() in (3, 5)
        return untied or any(p is not None and p.dim() == 2 for p in (self.scale, self.shift))

    def forward(self, x: Tensor, residual: Any = None, buffer: Tensor | None = None) -> Tensor:
        """The layer's result; with `room`, the tensor of all concatenated channels that holds it."""
        if self.pad is not None:
            x = F.pad(x, self.pad[0], mode=self.pad[1])
        buffers = cast(dict[str, Tensor], self._buffers)  # nn.Module finds an attribute that is one in a microsecond
        return functional.run_into(
            self.operation,
            x,
            buffers["weight"],
            buffers["mask_words"],
            self._route(None),
            buffers["scale"],
            buffers["shift"],
            residual,
            self.relu,
            self.geometry,
            self.room,
            buffer,
            self.backend,
            self._known,
        )

    def extra_repr(self) -> str:
        text = f"{self.operation}, {tuple(self.weight.shape)}, num_masks={self.num_masks}"
        return text + (", scaled" if self.scale is not None else "") + (", relu" if self.relu else "")


def _affine(bias: Tensor | None, norms: Sequence[nn.BatchNorm2d]) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, float64 (O,) or (K, O), of a bias and then batch norms in eval mode."""
    scale: Tensor | None = None
    shift = None if bias is None else bias.detach().double()
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        factor = torch.rsqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.detach().double()
        offset = -norm.running_mean.double() * factor
        if norm.bias is not None:
            offset = offset + norm.bias.detach().double()
        scale = factor if scale is None else scale * factor
        shift = offset if shift is None else shift * factor + offset
    return scale, shift


# ---- the graph


class _Proxy(fx.Proxy):
    """A traced value that `a += b` writes into: fx would trace `a = a + b`, which a tensor's other names do not see."""


def _write(name: str) -> Any:
    """The function of an in-place operator, as a traced graph calls it; numbers it leaves as they are."""
    function = getattr(operator, name)

    def write(a: Any, b: Any) -> Any:
        return function(a, b)

    write.__name__ = write.__qualname__ = f"_{name}"
    setattr(_Proxy, f"__{name}__", lambda a, b: a.tracer.create_proxy("call_function", write, (a, b), {}))
    return write


_iadd, _isub, _imul, _itruediv, _ifloordiv, _imod, _ipow, _imatmul, _iand, _ior, _ixor = _WRITES = tuple(
    _write(name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor")
)


class _Tracer(fx.Tracer):
    def __init__(self, leaves: Sequence[str] = ()) -> None:
        super().__init__()
        self._leaves = frozenset(leaves)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        ours = isinstance(module, (_Masked, SubsetBatchNorm2d))
        return ours or name in self._leaves or super().is_leaf_module(module, name)


def _module(model: fx.GraphModule, node: Any, *kinds: type[nn.Module]) -> nn.Module | None:
    """The module that a node calls with one tensor alone, if it is exactly of one of these kinds and has no hooks."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.kwargs or len(node.args) != 1:
        return None
    module = model.get_submodule(str(node.target))
    return module if type(module) in kinds and not (module._forward_hooks or module._forward_pre_hooks) else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _mutates(model: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write into a tensor that is there already."""
    if node.kwargs.get("inplace") or node.kwargs.get("out") is not None:
        return True
    if node.op == "call_module":
        return any(getattr(part, "inplace", False) for part in model.get_submodule(str(node.target)).modules())
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_function":
        if node.target in _WRITES or node.target is operator.setitem:
            return True
        if getattr(F, name, None) is node.target and any(argument is True for argument in node.args):
            return True  # F.relu(x, True)
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


_RELU_FUNCTIONS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_)
_ADD_FUNCTIONS: tuple[Any, ...] = (operator.add, _iadd, torch.add)


def _is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return _module(model, node, nn.ReLU) is not None


def _added(node: fx.Node, term: fx.Node) -> fx.Node | None:
    """What a node adds to `term`, if it is computed too: another tensor, or a number made of one's shape."""
    function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    if not (function or (node.op == "call_method" and node.target in ("add", "add_"))):
        return None
    if node.kwargs or len(node.args) != 2 or term not in node.args:
        return None
    if node.target in (_iadd, "add_") and node.args[0] is not term:
        return None  # written into the other one
    other = node.args[1] if node.args[0] is term else node.args[0]
    return other if isinstance(other, fx.Node) and other is not term else None


def _foldable(norm: nn.Module | None) -> bool:
    norm = cast(Any, norm)
    return norm is not None and norm.running_mean is not None and norm.running_var is not None


def _drop_identities(model: fx.GraphModule) -> None:
    kinds = (nn.Identity, nn.Dropout, nn.Dropout2d)
    for node in list(model.graph.nodes):
        if _module(model, node, *kinds) is not None:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def _fold_dense(model: fx.GraphModule) -> None:
    """A dense convolution whose batch norm has one set of statistics takes it into its weight."""
    for node in list(model.graph.nodes):
        conv = _module(model, node, nn.Conv2d, nn.ConvTranspose2d)
        user = _only_user(node) if conv is not None else None
        norm = cast(Any, _module(model, user, nn.BatchNorm2d, SubsetBatchNorm2d))
        if conv is None or user is None or not _foldable(norm) or norm.running_mean.dim() != 1:
            continue
        transposed = isinstance(conv, nn.ConvTranspose2d)
        if transposed and cast(Any, conv).groups > 1:
            continue  # its weight's second dimension is one group's outputs, torch scales it as if it were all
        folded = fuse_conv_bn_eval(cast(Any, conv), norm, transposed)
        name = _add(model, node, folded)
        with model.graph.inserting_before(node):
            replacement = model.graph.call_module(name, node.args)
        user.replace_all_uses_with(replacement)
        model.graph.erase_node(user)
        model.graph.erase_node(node)


class PointConv2d(nn.Module):
    """A dense 1×1 convolution: on planes of one pixel, as in squeeze-and-excitation, a linear layer is far quicker."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[2] != 1 or x.shape[3] != 1:
            return cast(Tensor, self.conv(x))
        return F.linear(x[:, :, 0, 0], self.conv.weight[:, :, 0, 0], self.conv.bias)[:, :, None, None]


def _find_points(model: fx.GraphModule) -> None:
    for node in list(model.graph.nodes):
        conv = cast(Any, _module(model, node, nn.Conv2d))
        if conv is None or conv.groups > 1 or conv.padding != (0, 0):
            continue
        if {*conv.kernel_size, *conv.stride} == {1}:
            node.target = _add(model, node, PointConv2d(conv))


def _fuse_layers(model: fx.GraphModule) -> None:
    graph = model.graph
    for node in list(graph.nodes):
        layer = _module(model, node, MaskedLinear, MaskedConv2d, MaskedConvTranspose2d)
        if layer is None:
            continue
        chain, norms, residual, relu, at = [node], [], None, False, node
        while (user := _only_user(chain[-1])) is not None and not relu:
            norm = _module(model, user, nn.BatchNorm2d, SubsetBatchNorm2d)
            if residual is None and not isinstance(layer, MaskedLinear) and _foldable(norm):
                norms.append(cast(nn.BatchNorm2d, norm))
            elif _is_relu(model, user):
                relu = True
            elif residual is None and (other := _added(user, chain[-1])) is not None:
                if _changes_between(model, chain, user):
                    break
                residual, at = other, user
            else:
                break
            chain.append(user)
        name = _add(model, node, FusedLayer(cast(MaskedLayer, layer), norms, relu))
        with graph.inserting_before(at):
            fused = graph.call_module(name, (*node.args, residual))
        chain[-1].replace_all_uses_with(fused)
        for old in reversed(chain):
            graph.erase_node(old)


def _changes_between(model: fx.GraphModule, chain: Sequence[fx.Node], last: fx.Node) -> bool:
    """Whether a tensor may be written into between a layer's first node and a later one, its own chain aside."""
    node = chain[0].next
    while node is not last:
        if node not in chain and _mutates(model, node):
            return True
        node = node.next
    return False


def _share_concatenations(model: fx.GraphModule) -> None:
    """Layers whose results are concatenated along the channels write them into the concatenation."""
    graph = model.graph
    if any(_mutates(model, node) for node in graph.nodes):
        return  # what is written into one tensor might be written into another
    place = {node: i for i, node in enumerate(graph.nodes)}
    for cat in [node for node in graph.nodes if _is_concatenation(node)]:
        parts = list(cat.args[0])
        layers = [_fused(model, part) for part in parts]
        if None in layers or len(set(parts)) < len(parts):
            continue
        if any(user.op == "output" for part in parts for user in part.users):
            continue  # two results of the model would lie in one tensor
        start, channels = 0, sum(cast(FusedLayer, layer).out_channels for layer in layers)
        rooms = {}
        for part, layer in zip(parts, layers, strict=True):
            assert layer is not None
            layer.room = (start, channels)
            rooms[part] = (start, layer.out_channels)
            start += layer.out_channels
        # Every layer returns the whole tensor: the first one makes it, the last one's stands for the concatenation.
        ordered = sorted(parts, key=place.__getitem__)
        for part in ordered:
            readers = [user for user in part.users if user is not cat]
            if readers:
                with graph.inserting_after(part):
                    piece = graph.call_function(torch.narrow, (part, 1, *rooms[part]))
                for reader in readers:
                    reader.replace_input_with(part, piece)
            if part is not ordered[0]:
                part.args = (*part.args, ordered[0])
        cat.replace_all_uses_with(ordered[-1])
        graph.erase_node(cat)


def _is_concatenation(node: fx.Node) -> bool:
    """Whether a node concatenates a list of tensors along dimension 1."""
    if node.op != "call_function" or node.target not in (torch.cat, torch.concat, torch.concatenate):
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) == 2 else None)
    listed = bool(node.args) and isinstance(node.args[0], (list, tuple))
    return bool(listed and dim == 1 and set(node.kwargs) <= {"dim"})


def _fused(model: fx.GraphModule, node: Any) -> FusedLayer | None:
    """The convolution that a node calls, if its result has no place yet and is all the layer's own."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or node.args[1:] != (None,):
        return None
    module = model.get_submodule(str(node.target))
    suits = isinstance(module, FusedLayer) and module.operation != "masked_linear" and module.room is None
    return cast(FusedLayer, module) if suits else None


def _add(model: fx.GraphModule, node: fx.Node, module: nn.Module) -> str:
    """Make a module part of the model, named after the one that `node` calls."""
    base = "fused_" + str(node.target).replace(".", "_")
    name, count = base, 1
    while hasattr(model, name):
        count += 1
        name = f"{base}_{count}"
    model.add_submodule(name, module)
    return name
