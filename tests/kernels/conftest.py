"""What all kernel tests share."""

import inspect

import pytest
import torch

from rtl_kernels import functional

# cuDNN rounds float32 to TF32 unless told not to: the dense computation that a kernel is judged by has to be exact.
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items):
    """A test of a backend that names no device runs on the CPU, which is not every backend's."""
    one = torch.ones(1, 1)
    refused = {name: module.supports("masked_linear", one, one) for name, module in functional.BACKENDS.items()}
    for item in items:
        parameters = getattr(item, "callspec", None)
        if parameters is None or "device" in inspect.signature(item.function).parameters:
            continue
        reason = refused.get(parameters.params.get("backend"))
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"{parameters.params['backend']}: {reason}"))


@pytest.fixture(autouse=True)
def repeatable_reference(request, monkeypatch):
    """On a GPU the reference runs PyTorch's convolutions, and cuDNN's float64 ones change bits from call to call. What
    the reference itself does is judged with the others, which are slow and repeat."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if (given.get("backend"), given.get("device")) == ("reference", "cuda"):
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
