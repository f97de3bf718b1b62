"""`python -m rtl_kernels.info` says what is here and how each operator would run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from rtl_kernels import MaskBank, Route, functional, info, masked_linear
from rtl_kernels.backends import cpu


def test_it_collects_versions_backends_and_every_operator():
    collected = info.collect()
    assert collected["torch"] == torch.__version__
    assert collected["threads"] == torch.get_num_threads()
    assert collected["backends"] == list(functional.BACKENDS)
    rows = collected["operators"]
    assert {r["operation"] for r in rows} == {"masked_linear", "masked_conv2d", "masked_conv_transpose2d"}
    assert {r["dtype"] for r in rows} == {"float32", "float64", "float16", "bfloat16"}
    assert {r["backend"] for r in rows} <= set(functional.BACKENDS)
    assert json.loads(json.dumps(collected)) == collected


@pytest.mark.skipif(cpu.unavailable is not None, reason="no compiled library")
def test_a_library_of_other_sources_is_refused(monkeypatch):
    assert cpu._load() is None
    monkeypatch.setattr(cpu, "_DEFINED", (*cpu._DEFINED, "cpu_of_tomorrow"))
    assert "built from other sources, without cpu_of_tomorrow (reinstall: pip install" in cpu._load()


def test_it_says_why_a_backend_was_refused():
    row = {"operation": "masked_linear", "device": "cpu", "backend": "reference", "refused": {"cpu": "not built"}}
    rows = [{**row, "dtype": "float32"}, {**row, "dtype": "float16"}, {**row, "dtype": "float64", "refused": {}}]
    text = info.describe({"cuda": None, "operators": rows})
    assert text.splitlines() == [
        "cuda       none",
        "the cuda and triton backends are tested on an H200 (9.0); for other GPUs they are verified by compilation, "
        "interpretation and emulation",
        "masked_linear on cpu, float32, float16: runs on reference",
        "  not cpu: not built",
        "masked_linear on cpu, float64: runs on reference",
    ]


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"the cpu backend is not there: {cpu.unavailable}")
def test_it_names_the_instructions_and_the_masks_kept():
    bank = MaskBank.ones(1, (64, 64))
    x = torch.ones(32, 64)
    masked_linear(x, x.new_ones(64, 64), bank, Route.build([0] * 32, 1), backend="cpu")
    compiled = info.collect()["compiled"]
    assert compiled["level"] in compiled["levels"]
    assert 0 < compiled["cache_bytes"] <= compiled["cache_limit"]
    text = info.describe({"operators": [], "compiled": {**compiled, "cache_bytes": 3 << 19, "cache_limit": 5 << 20}})
    levels = ", ".join(compiled["levels"])
    assert text.splitlines()[:2] == [
        f"compiled   yes, runs {compiled['level']} (RTL_KERNELS_CPU_LEVEL: {levels})",
        "masks kept 1.5 of at most 5 MB (RTL_KERNELS_CACHE_MB)",
    ]


@pytest.mark.skipif(cpu.unavailable is not None, reason=f"the cpu backend is not there: {cpu.unavailable}")
def test_it_tells_of_a_setting_that_the_kernels_refuse(monkeypatch):
    monkeypatch.setenv("RTL_KERNELS_CACHE_MB", "1G")
    text = info.describe(info.collect())
    assert "yes, but RTL_KERNELS_CACHE_MB is '1G', expected" in text
    assert "masked_linear on cpu, float32, float64, float16, bfloat16: runs on cpu, which refuses it: see above" in text


def test_it_says_why_there_is_no_compiled_backend():
    text = info.describe({"operators": [], "compiled": {"missing": "the extension is not built"}})
    assert text.splitlines()[0].split(maxsplit=1) == ["compiled", "no: the extension is not built"]


def test_it_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "rtl_kernels.info"], capture_output=True, text=True, check=True)
    assert torch.__version__ in shown.stdout
    assert "masked_conv2d on cpu" in shown.stdout
    assert shown.stderr == ""


def test_its_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        info.main(["--help"])
    assert exit_.value.code == 0
    assert "$ python -m rtl_kernels.info" in capsys.readouterr().out
