"""`python -m rtl_kernels.info` says what is here and how each operator would run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from rtl_kernels import functional, info


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


def test_it_says_why_a_backend_was_refused():
    row = {"operation": "masked_linear", "device": "cpu", "backend": "reference", "refused": {"cpu": "not built"}}
    rows = [{**row, "dtype": "float32"}, {**row, "dtype": "float16"}, {**row, "dtype": "float64", "refused": {}}]
    text = info.describe({"cuda": None, "operators": rows})
    assert text.splitlines() == [
        "cuda       none",
        "the cuda and triton backends are verified by compilation, interpretation and emulation; "
        "they have not been run on hardware",
        "masked_linear on cpu, float32, float16: runs on reference",
        "  not cpu: not built",
        "masked_linear on cpu, float64: runs on reference",
    ]


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
