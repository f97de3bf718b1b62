"""Without a compiler the package installs, runs on the reference, and says so once."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE = """
import json, warnings
import torch
import rtl_kernels as rk, rtl
from rtl_kernels import info

x, weight = torch.randn(6, 5), torch.randn(4, 5, requires_grad=True)
masks = torch.rand(2, 4, 5) < 0.5
index = torch.tensor([0, 1, -1, 1, 0, 0])
bank, route = rk.MaskBank.from_dense(masks), rk.Route.build(index, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        y = rk.masked_linear(x, weight, bank, route)
y.sum().backward()
kept = torch.cat([torch.ones(1, 4, 5, dtype=torch.bool), masks])[index + 1]
exact = torch.einsum("bi,boi->bo", x.double(), (weight * kept).double())
print(json.dumps({
    "where": rk.__file__,
    "warnings": [str(w.message) for w in caught],
    "error": float((y - exact).abs().max()),
    "gradient": float((weight.grad - torch.einsum("bi,boi->oi", x, kept.float())).abs().max()),
    "backend": rk.explain(rk.masked_linear, x, weight, bank, route).backend,
    "info": info.describe(info.collect()),
}))
"""


needs_setuptools = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed"
)


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What it printed, on either stream; it has to end well."""
    clean = {k: v for k, v in os.environ.items() if k not in ("CXX", "PYTHONPATH", "RTL_KERNELS_NO_CPU")}
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env={**clean, **environment}
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


@needs_setuptools
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("RTL_KERNELS_NO_CPU", "1", "RTL_KERNELS_NO_CPU=1"),
        ("CXX", "no-such-compiler", "no C++ compiler (no-such-compiler; set CXX)"),
    ],
)
def test_the_build_says_why_it_leaves_the_kernels_out(variable: str, value: str, reason: str) -> None:
    shown = run([sys.executable, str(ROOT / "setup.py"), "--name"], ROOT, **{variable: value})
    assert f"the compiled CPU backend is not built: {reason}" in shown
    assert shown.splitlines()[-1] == "rtl-kernels"


@needs_setuptools
# By its metadata: looking for the module itself would switch off setuptools' distutils in this process.
@pytest.mark.skipif(not list(importlib.metadata.distributions(name="pip")), reason="pip is not installed")
def test_without_a_compiler_it_installs_and_runs_on_the_reference(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("rtl", "rtl_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    venv.create(tmp_path / "venv", symlinks=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    # torch and all else, from here: a path file adds them, and none of the path files among them.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    options = ["--no-build-isolation", "--no-index", "--no-deps", "--ignore-installed", "--no-cache-dir"]
    run([python, "-m", "pip", "install", *options, str(source)], tmp_path, CXX="no-such-compiler")
    assert not list(packages.glob("rtl_kernels/*.so"))

    found = json.loads(run([python, "-c", USE], tmp_path).splitlines()[-1])
    assert Path(found["where"]).is_relative_to(packages)
    assert len(found["warnings"]) == 1, found["warnings"]
    assert "run on the reference: the extension is not built" in found["warnings"][0]
    assert found["error"] < 1e-5
    assert found["gradient"] < 1e-5
    assert found["backend"] == "reference"
    assert "compiled     no: the extension is not built" in found["info"]
