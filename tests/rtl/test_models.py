import pytest
import torch
from torch import nn

from rtl.errors import InputError
from rtl.models import ghostnet, mlp, small_conv

GHOSTNET = {
    "stem.0": 3 * 16 * 9,
    "blocks.0.expand.primary.0": 16 * 8,
    "blocks.0.expand.cheap.0": 8 * 9,
    "blocks.0.project.primary.0": 16 * 8,
    "blocks.0.project.cheap.0": 8 * 9,
    "blocks.1.expand.primary.0": 16 * 24,
    "blocks.1.expand.cheap.0": 24 * 9,
    "blocks.1.downsample.0": 48 * 9,
    "blocks.1.project.primary.0": 48 * 12,
    "blocks.1.project.cheap.0": 12 * 9,
    "blocks.1.shortcut.0.0": 16 * 9,
    "blocks.1.shortcut.1.0": 16 * 24,
    "blocks.2.expand.primary.0": 24 * 36,
    "blocks.2.expand.cheap.0": 36 * 9,
    "blocks.2.project.primary.0": 72 * 12,
    "blocks.2.project.cheap.0": 12 * 9,
    "blocks.3.expand.primary.0": 24 * 36,
    "blocks.3.expand.cheap.0": 36 * 9,
    "blocks.3.downsample.0": 72 * 25,
    "blocks.3.project.primary.0": 72 * 20,
    "blocks.3.project.cheap.0": 20 * 9,
    "blocks.3.shortcut.0.0": 24 * 25,
    "blocks.3.shortcut.1.0": 24 * 40,
    "blocks.4.expand.primary.0": 40 * 60,
    "blocks.4.expand.cheap.0": 60 * 9,
    "blocks.4.project.primary.0": 120 * 20,
    "blocks.4.project.cheap.0": 20 * 9,
    "blocks.5.expand.primary.0": 40 * 120,
    "blocks.5.expand.cheap.0": 120 * 9,
    "blocks.5.downsample.0": 240 * 9,
    "blocks.5.project.primary.0": 240 * 40,
    "blocks.5.project.cheap.0": 40 * 9,
    "blocks.5.shortcut.0.0": 40 * 9,
    "blocks.5.shortcut.1.0": 40 * 80,
    "blocks.6.expand.primary.0": 80 * 100,
    "blocks.6.expand.cheap.0": 100 * 9,
    "blocks.6.project.primary.0": 200 * 40,
    "blocks.6.project.cheap.0": 40 * 9,
    "blocks.7.expand.primary.0": 80 * 92,
    "blocks.7.expand.cheap.0": 92 * 9,
    "blocks.7.project.primary.0": 184 * 40,
    "blocks.7.project.cheap.0": 40 * 9,
    "blocks.8.expand.primary.0": 80 * 92,
    "blocks.8.expand.cheap.0": 92 * 9,
    "blocks.8.project.primary.0": 184 * 40,
    "blocks.8.project.cheap.0": 40 * 9,
    "tail.0": 80 * 184,
    "head.0": 184 * 128,
}


def prunable_weights(model):
    return {name: m.weight.numel() for name, m in model.named_modules() if model.prunable(name, m)}


def outputs_of(model, modules, x):
    """What each of `modules` gives when `model` computes `x`."""
    seen = []
    hooks = [m.register_forward_hook(lambda module, args, output: seen.append(output)) for m in modules]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def test_ghostnet_has_exactly_125_832_prunable_weights_layer_by_layer():
    assert prunable_weights(ghostnet()) == GHOSTNET
    assert sum(GHOSTNET.values()) == 125_832


def test_what_ghostnet_keeps_dense_is_squeeze_and_excitation_batch_norm_and_the_classifier():
    model = ghostnet()
    dense = {
        (name.split(".")[2] if "squeeze" in name else type(m).__name__)
        for name, m in model.named_modules()
        if list(m.parameters(recurse=False)) and not model.prunable(name, m)
    }
    assert dense == {"squeeze", "BatchNorm2d", "Linear"}
    widths = [(m.in_channels, m.out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {pair for pair in widths if pair[1] in (20, 32)} >= {(72, 20), (120, 32)}


def test_ghostnet_halves_the_plane_five_times_to_2x2():
    model = ghostnet()
    outputs = outputs_of(model, [model.stem, *model.blocks, model.tail, model.head], torch.randn(2, 3, 32, 32))
    assert [tuple(y.shape[1:]) for y in outputs] == [
        (16, 16, 16),
        (16, 16, 16),
        (24, 8, 8),
        (24, 8, 8),
        (40, 4, 4),
        (40, 4, 4),
        (80, 2, 2),
        (80, 2, 2),
        (80, 2, 2),
        (80, 2, 2),
        (184, 2, 2),
        (128, 2, 2),
    ]


def test_ghost_bottlenecks_expand_with_relu_and_project_without():
    model = ghostnet()
    x = torch.randn(4, 3, 32, 32)
    assert all(y.min() >= 0 for y in outputs_of(model, [block.expand for block in model.blocks], x))
    assert all(y.min() < 0 for y in outputs_of(model, [block.project for block in model.blocks], x))


def test_a_ghost_module_makes_its_second_half_from_its_first():
    ghost = ghostnet().blocks[3].expand.eval()
    x = torch.randn(2, 24, 8, 8)
    y = ghost(x)
    assert torch.equal(y[:, :36], ghost.primary(x))
    assert torch.equal(y[:, 36:], ghost.cheap(y[:, :36]))


def test_squeeze_and_excitation_scales_each_channel_by_a_number_between_0_and_1():
    squeeze = ghostnet().blocks[4].squeeze
    x = torch.rand(2, 120, 4, 4) + 0.5
    scale = squeeze(x) / x
    torch.testing.assert_close(scale, scale[:, :, :1, :1].expand_as(scale))
    assert scale.min() >= 0
    assert scale.max() <= 1
    gate = torch.clamp((squeeze.expand(squeeze.reduce(x.mean((2, 3), keepdim=True)).relu()) + 3) / 6, 0, 1)
    torch.testing.assert_close(scale[:, :, :1, :1], gate)


def test_only_bottlenecks_that_change_shape_have_weights_in_their_shortcut():
    with_weights = [i for i, block in enumerate(ghostnet().blocks) if list(block.shortcut.parameters())]
    assert with_weights == [1, 3, 5]


@pytest.mark.parametrize(
    ("model", "x", "classes"),
    [
        (ghostnet(num_classes=7), torch.randn(3, 3, 32, 32), 7),
        (ghostnet(num_classes=2, in_channels=1), torch.randn(3, 1, 32, 32), 2),
        (small_conv(), torch.randn(3, 1, 8, 8), 10),
        (mlp(5, [4], 2), torch.randn(3, 5), 2),
    ],
    ids=["ghostnet", "grey ghostnet", "small_conv", "mlp"],
)
def test_every_parameter_gets_a_gradient(model, x, classes):
    y = model(x)
    assert y.shape == (3, classes)
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["stem.0", "blocks.3.downsample.0", "blocks.5.shortcut.0.0", "head.0"])
def test_weights_start_kaiming_normal_in_fan_in_so_depthwise_counts_its_own_window(name):
    torch.manual_seed(0)
    weight = ghostnet().get_submodule(name).weight
    expected = (2 / weight[0].numel()) ** 0.5
    assert abs(weight.std() / expected - 1) < 4 / (2 * weight.numel()) ** 0.5


def test_biases_start_at_zero():
    model = ghostnet()
    assert not model.head[0].bias.any()
    assert not model.classifier.bias.any()


def test_small_conv_has_32_400_prunable_weights_for_grey_images():
    counts = prunable_weights(small_conv())
    assert list(counts.values()) == [144, 4608, 9216, 18432]
    assert sum(counts.values()) == 32_400
    assert sum(prunable_weights(small_conv(in_channels=3)).values()) == 144 * 3 + 32_256
    model = small_conv()
    planes = [y.shape[-1] for y in outputs_of(model, list(model.features), torch.randn(2, 1, 8, 8))]
    assert planes == [8, 4, 4, 2]


def test_the_weights_of_an_mlp_are_all_prunable():
    model = mlp(34, [128] * 4, 3)
    assert sum(prunable_weights(model).values()) == 53_888  # the paper's count of its coordinate network
    assert model(torch.randn(2, 5, 34)).shape == (2, 5, 3)


def test_an_mlp_has_relu_between_layers_and_none_at_the_end():
    model = mlp(2, [3], 1)
    first, last = model.layers[0], model.layers[2]
    x = torch.randn(50, 2)
    torch.testing.assert_close(model(x), last(first(x).relu()))
    assert len(mlp(2, [], 1).layers) == 1


def test_a_size_below_one_is_refused():
    for make in (lambda: ghostnet(num_classes=0), lambda: small_conv(in_channels=0), lambda: mlp(2, [0], 1)):
        with pytest.raises(InputError, match="holds 0, but sizes are 1 or more"):
            make()
