"""rtl.fit: the description of training, and the one optimiser step of every method."""

import pytest
import torch
from torch import nn
from toys import TinyConv, Wide, blobs, images, mlp, seeded

import rtl_kernels as rk
from rtl.errors import InputError
from rtl.fit import Fit, digest, masked_copy, new_optimizer, rewind, split, state, step
from rtl.partition import by_label
from rtl.tasks import MultiClass, OneVsRest, Pixels


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"task": MultiClass}, r"task is <class .*, expected a task such as rtl.tasks.MultiClass\(\)"),
        ({"task": "multi_class"}, "task is 'multi_class'"),
        ({"schedule": "mixd"}, "schedule is 'mixd', expected one of sequential, mixed, pooled"),
        ({"masked": "weights"}, "masked is 'weights', expected one of update, gradient"),
        ({"lr_schedule": "linear"}, "lr_schedule is 'linear', expected one of constant, cosine"),
        ({"augment": "flip"}, "augment is 'flip', expected one of none, crop_flip"),
        ({"batch_norm": "none"}, "batch_norm is 'none', expected one of per_ticket, shared"),
        ({"batch_norm": "shared", "affine_per_ticket": True}, "affine_per_ticket is True with batch_norm 'shared'"),
    ],
)
def test_a_bad_value_is_refused_by_name(values, message):
    with pytest.raises(InputError, match=message):
        Fit(**values)


@pytest.mark.parametrize(("samples", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (3, [3]), (1, [1]), (8, [4, 4])])
def test_batches_keep_the_order_and_none_but_an_only_one_has_a_single_sample(samples, sizes):
    order = torch.randperm(samples)
    batches = split(order, 4)
    assert [len(b) for b in batches] == sizes
    assert torch.equal(torch.cat(batches), order)


def test_a_masked_copy_leaves_the_model_dense_and_masks_what_it_calls_prunable():
    model = TinyConv()
    before = digest(model.state_dict())
    net = masked_copy(model, 2, "per_ticket")
    assert list(net.banks) == ["features.0", "features.3"]
    assert type(model.features[0]) is nn.Conv2d
    assert digest(model.state_dict()) == before


def test_a_model_silent_about_what_is_prunable_has_all_its_layers_masked():
    net = masked_copy(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 2, "shared")
    assert list(net.banks) == ["0", "2"]


def test_a_model_with_nothing_to_prune_is_refused():
    with pytest.raises(InputError, match="model is a ReLU, which cannot be pruned"):
        masked_copy(nn.ReLU(), 2, "shared")
    with pytest.raises(InputError, match=r"model is a type, expected a torch.nn.Module"):
        masked_copy(TinyConv, 2, "shared")


def test_rewinding_puts_back_weights_and_statistics_but_not_masks():
    parts = by_label(images())
    net = masked_copy(seeded(TinyConv), 1, "shared")
    theta0 = state(net)
    kept = digest(theta0)
    net.banks = {layer: rk.MaskBank.from_dense(bank.to_dense() & False) for layer, bank in net.banks.items()}
    net.train()
    step(net, new_optimizer(net, Fit(lr=0.1)), Fit(), parts, [(0, 0, torch.arange(12))])
    assert digest(state(net)) != kept
    rewind(net, theta0)
    assert digest(state(net)) == kept == digest(theta0)
    assert all(int(bank.union().counts()) == 0 for bank in net.banks.values())


def test_a_mixed_step_follows_the_mean_loss_of_all_its_samples():
    parts = by_label(blobs())
    net = masked_copy(Wide(mlp()), 3, "shared")
    batch = [(k, k, parts[k][: 5 + k]) for k in range(3)]
    apart = [
        OneVsRest().losses(_logits(net, parts, m, i), OneVsRest().target(parts, k, i), _full(k, i)) for m, k, i in batch
    ]
    loss = step(net, new_optimizer(net, Fit()), Fit(), parts, batch)
    torch.testing.assert_close(loss, torch.cat(apart).mean())


def test_a_model_that_gives_no_tensor_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    parts = by_label(blobs())
    net = masked_copy(nn.Sequential(nn.Linear(6, 3), Pair(3, 3)), 1, "shared")
    with pytest.raises(InputError, match="the model's output is a tuple, expected a tensor"):
        step(net, new_optimizer(net, Fit()), Fit(), parts, [(0, 0, parts[0][:4])])


def test_an_untied_step_moves_each_ticket_as_its_own_mean_loss_would():
    parts = by_label(blobs())
    together = rk.nn.untie(masked_copy(Wide(mlp()), 2, "shared"))
    batch = [(0, 0, parts[0][:4]), (1, 2, parts[1][:12])]
    optimizer = torch.optim.SGD(together.parameters(), lr=1.0)
    step(together, optimizer, Fit(), parts, batch)
    for mask, ticket, index in batch:
        alone = masked_copy(Wide(mlp()), 1, "shared")
        step(alone, torch.optim.SGD(alone.parameters(), lr=1.0), Fit(), parts, [(0, ticket, index)])
        for name, module in alone.masked_modules().items():
            torch.testing.assert_close(together.masked_modules()[name].weight[mask], module.weight, rtol=0, atol=1e-12)


def test_a_digest_tells_names_dtypes_shapes_and_every_bit():
    one = {"a": torch.zeros(4), "b": torch.ones(2)}
    others = [
        {"a": torch.zeros(4), "c": torch.ones(2)},
        {"a": torch.zeros(4, dtype=torch.int32), "b": torch.ones(2)},
        {"a": torch.zeros(2, 2), "b": torch.ones(2)},
        {"a": torch.zeros(4), "b": torch.tensor([1, 1 + 2**-23])},
        {"a": -torch.zeros(4), "b": torch.ones(2)},
    ]
    assert len({digest(s) for s in [one, *others]}) == 6
    assert digest({"b": one["b"], "a": one["a"]}) == digest(one)


def _full(value, index):
    return torch.full((len(index),), value)


def _logits(net, parts, mask, index):
    return net(parts.data.batch(index)[0], _full(mask, index)).detach()


def test_a_fit_is_described_with_all_that_its_task_was_given():
    assert Fit().described()["task"] == "one_vs_rest"
    described = Fit(lr=0.5, task=Pixels(7)).described()
    assert described["task"] == {"name": "pixels", "samples": 7, "by_area": False}
    assert described["lr"] == 0.5
