"""What all tests share: a result depends neither on who ran before nor on whose terminal or home it is."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Property tests draw the same examples on every run: a failure here is a failure there. How long a machine takes to
# draw them is no property.
settings.register_profile(
    "same",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("same")

# What rich and tyro take a terminal's width and colours from.
for _name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(_name, None)
os.environ["TERM"] = "xterm"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before fixtures too."""
    torch.manual_seed(0)
