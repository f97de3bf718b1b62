"""What setup.py decides to build, and what it says where it does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for key in ("NO_CPU", "NO_CUDA", "FORCE_CUDA", "CUDA_ARCHS"):
        monkeypatch.delenv(f"RTL_KERNELS_{key}", raising=False)
    spec = importlib.util.spec_from_file_location("rtl_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "why_not", lambda: None)
    return module


def test_without_nvcc_the_cuda_backend_is_left_out_in_words(setup, monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert setup.why_not_cuda() == "no nvcc (set CUDA_HOME)"


def test_with_nvcc_and_no_gpu_it_is_built(setup, monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda: "/somewhere/bin/nvcc")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup.why_not_cuda() is None


def test_for_a_torch_without_cuda_it_is_built_on_demand_only(setup, monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda: "/somewhere/bin/nvcc")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in setup.why_not_cuda()
    monkeypatch.setenv("RTL_KERNELS_FORCE_CUDA", "1")
    assert setup.why_not_cuda() is None


def test_forcing_what_cannot_be_built_is_an_error(setup, monkeypatch):
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    monkeypatch.setenv("RTL_KERNELS_FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match=r"RTL_KERNELS_FORCE_CUDA=1, but .* no nvcc"):
        setup.why_not_cuda()


def test_backends_can_be_left_out(setup, monkeypatch):
    monkeypatch.setenv("RTL_KERNELS_NO_CPU", "1")
    monkeypatch.setenv("RTL_KERNELS_NO_CUDA", "1")
    assert setup.why_not_cpu() == "RTL_KERNELS_NO_CPU=1"
    assert setup.why_not_cuda() == "RTL_KERNELS_NO_CUDA=1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", [80, 86, 89, 90, 100]), ("90;80", [80, 90]), ("8.0 9.0", [80, 90]), ("sm_86, sm_86", [86])],
)
def test_architectures_are_listed(setup, monkeypatch, text, expected):
    monkeypatch.setenv("RTL_KERNELS_CUDA_ARCHS", text)
    assert setup.cuda_architectures() == expected
    built, command, _ = setup.kernels(Path("out"))[0]
    assert str(built).startswith("out/cuda/")
    codes = [part.rpartition("code=")[2] for part in command if part.startswith("-gencode")]
    assert codes == [f"sm_{a}" for a in expected] + [f"compute_{expected[-1]}"]
    assert "csrc/cuda/launch.cu" in command


@pytest.mark.parametrize("text", ["75", "80;seventy", "80+PTX"])
def test_other_architectures_are_refused(setup, monkeypatch, text):
    monkeypatch.setenv("RTL_KERNELS_CUDA_ARCHS", text)
    with pytest.raises(SystemExit, match="RTL_KERNELS_CUDA_ARCHS is"):
        setup.cuda_architectures()
