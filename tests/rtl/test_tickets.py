"""rtl.tickets: tickets called by name, exported bit for bit, saved and read back, also by later versions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TinyConv, blobs, flat_masks, images, mlp, quiet, seeded

import rtl
import rtl_kernels as rk
from rtl.errors import InputError
from rtl.extract import PrunePlan, extract
from rtl.fit import Fit, digest
from rtl.partition import by_label
from rtl.retrain import retrain
from rtl.tickets import TicketMasks, TicketNetwork

FIXTURES = Path(__file__).parent / "fixtures"


def trained(path, model=None, parts=None, **fit):
    """Three tickets of a small network, as users make them."""
    model, parts = model or seeded(TinyConv), parts or by_label(images())
    fit = Fit(epochs=1, batch_size=16, lr=0.01, **fit)
    run = quiet(path)
    return retrain(model, extract(model, parts, PrunePlan(0.5, 0.5), fit, run).at(0.5), parts, fit, run)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="module")
def x():
    return images().inputs[:6]


def differs(a, b):
    return bool((a != b).any())


# Masks


def test_params_is_the_union_and_named_tickets_can_be_taken_alone():
    bits = torch.zeros(3, 2, 4, dtype=torch.bool)
    bits[0, 0, :2] = bits[1, 0, 1:3] = bits[2, 1, 0] = True
    masks = TicketMasks(("a", "b", "c"), 0.5, {"w": rk.MaskBank.from_dense(bits)})
    assert masks.params == 4
    taken = masks.only("c", "a")
    assert taken.names == ("c", "a")
    assert taken.params == 3
    assert torch.equal(flat_masks(taken), bits[[2, 0]].flatten(1))
    with pytest.raises(InputError, match="ticket is 'z', expected one of a, b, c"):
        masks.only("z")


# Calling


def test_a_name_a_number_a_list_and_a_tensor_say_the_same(net, x):
    one = net(x, ticket="b")
    for number in (1, np.int64(1), torch.tensor(1), np.ones(6, dtype=np.int64), [torch.tensor(1)] * 6):
        assert torch.equal(net(x, ticket=number), one)
    assert torch.equal(net(x, ticket=["b"] * 6), one)
    assert torch.equal(net(x, ticket=torch.ones(6, dtype=torch.int64)), one)
    assert differs(net(x, ticket="a"), one)


def test_each_sample_of_a_batch_goes_through_the_ticket_named_for_it(net, x):
    names = ["c", "a", "b", "a", "c", "c"]
    mixed = net(x, ticket=names)
    for b, name in enumerate(names):
        torch.testing.assert_close(mixed[b], net(x, ticket=name)[b], rtol=0, atol=1e-6)
    assert torch.equal(net(x, ticket=[2, "a", 1, 0, "c", 2]), mixed)


def test_every_sample_goes_through_every_ticket(net, x):
    every = net.every(x)
    assert every.shape == (3, 6, 3)
    for k, name in enumerate(net.names):
        torch.testing.assert_close(every[k], net(x, ticket=name), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ticket", "message"),
    [
        ("dog", "ticket is 'dog', expected one of a, b, c"),
        (["a", "b", "c", "a", "b", "dog"], "ticket is 'dog', expected one of a, b, c"),
        (3, r"ticket is 3, but there are 3 \(0..2\)"),
        (-1, "ticket is -1"),
        (1.0, "ticket is 1.0, expected a name or a number"),
        ([0.5] * 6, "ticket is 0.5, expected a name or a number"),
        (None, "ticket is None, expected a name or a number"),
        (["a", "b"], "ticket names 2 tickets, but x holds 6 samples"),
        (torch.zeros(2, dtype=torch.int64), "ticket names 2 tickets, but x holds 6 samples"),
    ],
)
def test_an_unknown_ticket_or_a_wrong_number_of_them_is_refused(net, x, ticket, message):
    with pytest.raises(InputError, match=message):
        net(x, ticket=ticket)


def test_it_says_how_many_weights_it_takes(net):
    assert net.params == int(torch.cat([b.to_dense().any(0).flatten() for b in net.net.banks.values()]).sum())
    assert net.batch_norm_params == 2 * (4 + 4) + 2 * 3 * (4 + 4)  # scale and shift shared, statistics per ticket


# Exporting


@pytest.mark.parametrize("fit", [{}, {"batch_norm": "shared"}, {"affine_per_ticket": True}])
def test_an_exported_ticket_is_a_plain_module_of_the_tickets_weights_bit_for_bit(tmp_path, x, fit):
    net = trained(tmp_path, **fit)
    for k, name in enumerate(net.names):
        plain = net.export(name)
        assert {type(m) for m in plain.modules()} == {type(m) for m in TinyConv().modules()}
        for layer, module in net.net.masked_modules().items():
            expected = torch.where(module.bank.dense(k), module.weight, 0)
            assert torch.equal(plain.get_submodule(layer).weight, expected)
        torch.testing.assert_close(plain(x), net(x, ticket=name), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="ticket is 'dog', expected one of"):
        net.export("dog")


# Saving


@pytest.mark.parametrize("fit", [{}, {"batch_norm": "shared"}, {"affine_per_ticket": True}])
def test_what_is_saved_comes_back_with_the_same_outputs_bit_for_bit(tmp_path, x, fit):
    net = trained(tmp_path / "run", **fit)
    net.save_pretrained(tmp_path / "saved")
    again = TicketNetwork.from_pretrained(tmp_path / "saved", TinyConv())
    assert digest(again.state_dict()) == digest(net.state_dict())
    assert torch.equal(again(x, ticket=list("abcabc")), net(x, ticket=list("abcabc")))
    for name in (
        "names",
        "outputs",
        "task",
        "sparsity",
        "samples",
        "seconds",
        "params",
        "batch_norm_params",
        "training",
    ):
        assert getattr(again, name) == getattr(net, name)


def test_a_network_of_rtl_models_needs_no_model_to_come_back(tmp_path):
    net = trained(tmp_path / "run", mlp(), by_label(blobs()))
    net.save_pretrained(tmp_path / "saved")
    again = TicketNetwork.from_pretrained(tmp_path / "saved")
    assert isinstance(again.net.model, rtl.models.MLP)
    assert digest(again.state_dict()) == digest(net.state_dict())


def test_saving_twice_writes_the_same_bytes(tmp_path, net):
    for name in ("one", "two"):
        net.save_pretrained(tmp_path / name)
    for file in ("tickets.safetensors", "tickets.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_saving_over_another_network_never_leaves_its_names_beside_the_new_weights(tmp_path, net, monkeypatch):
    net.save_pretrained(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rtl.tickets, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        net.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds no saved tickets"):
        TicketNetwork.from_pretrained(tmp_path, TinyConv())


def edit(folder, **changes):
    file = folder / "tickets.json"
    description = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in description.items() if value is not ...}))


def lose(folder, name):
    state = load_file(folder / "tickets.safetensors")
    save_file({key: value for key, value in state.items() if key != name}, folder / "tickets.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "holds no saved tickets"),
        (lambda d: (d / "tickets.json").unlink(), "holds no saved tickets"),
        (lambda d: (d / "tickets.safetensors").unlink(), "holds no saved tickets"),
        (lambda d: (d / "tickets.json").write_text("{"), "holds no saved tickets"),
        (lambda d: (d / "tickets.json").write_text("[]"), "is damaged"),
        (lambda d: edit(d, names=...), "is damaged, it lacks names"),
        (lambda d: (d / "tickets.safetensors").write_bytes(b"x" * 100), "holds no saved tickets"),
        (lambda d: (d / "tickets.safetensors").write_bytes(b""), "holds no saved tickets"),
        (
            lambda d: (d / "tickets.safetensors").write_bytes((d / "tickets.safetensors").read_bytes()[:-9]),
            "holds no saved tickets",
        ),
        (lambda d: lose(d, "features.0.mask_words"), "model is a TinyConv with features.0.mask_words, which .* lacks"),
        (lambda d: lose(d, "features.0.weight"), "do not fit.*features.0.weight"),
        (lambda d: edit(d, names=["a", "b"]), "do not fit"),
    ],
)
def test_damaged_or_missing_files_are_refused_in_one_line(tmp_path, net, damage, message):
    net.save_pretrained(tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(InputError, match=message) as caught:
        TicketNetwork.from_pretrained(tmp_path / "saved", TinyConv())
    assert "\n" not in str(caught.value)


def test_a_model_that_is_not_known_or_does_not_fit_is_refused(tmp_path, net):
    net.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model is not given.*pass model="):
        TicketNetwork.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model is a MLP with layers\.0\.mask_words, which .* lacks: pass the model"):
        TicketNetwork.from_pretrained(tmp_path, mlp())
    for name in ("nothing", "small", "__doc__"):
        edit(tmp_path, model={"name": name, "arguments": {}})
        with pytest.raises(InputError, match=f"model is '{name}' in the saved tickets, which rtl.models does not have"):
            TicketNetwork.from_pretrained(tmp_path)


# What version 0.1 saved. Written once by `python tests/rtl/test_tickets.py`; never write it again: that later versions
# read it is the point.


@pytest.mark.parametrize(("name", "model"), [("0.1-mlp", None), ("0.1-conv-affine", TinyConv)])
def test_what_version_0_1_saved_still_loads_and_answers_the_same(name, model):
    net = TicketNetwork.from_pretrained(FIXTURES / name, model and model())
    expected = load_file(FIXTURES / name / "expected.safetensors")
    assert net.names == ("a", "b", "c")
    assert net.outputs == (0, 1, 2)
    assert (net.task, net.sparsity) == ("one_vs_rest", 0.5)
    for layer, bank in net.net.banks.items():
        assert torch.equal(bank.to_dense(), expected[f"masks/{layer}"])
    with torch.no_grad():
        torch.testing.assert_close(net.every(expected["x"]), expected["every"], rtol=1e-5, atol=1e-6)


def write_fixtures():
    import tempfile

    for name, model, parts, fit in (
        ("0.1-mlp", mlp(), by_label(blobs()), {}),
        ("0.1-conv-affine", seeded(TinyConv), by_label(images()), {"affine_per_ticket": True}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            net = trained(folder, model, parts, **fit)
        x = parts.data.inputs[:4].clone()
        with torch.no_grad():
            expected = {"x": x, "every": net.every(x).contiguous()}
        expected |= {f"masks/{layer}": bank.to_dense() for layer, bank in net.net.banks.items()}
        net.save_pretrained(FIXTURES / name)
        save_file(expected, FIXTURES / name / "expected.safetensors")


if __name__ == "__main__":
    write_fixtures()
