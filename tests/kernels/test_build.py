"""The other tests of the compiled backend skip where it is missing; this one says when it must not be."""

import os
import shutil

import pytest

from rtl_kernels.backends import cpu

NO_COMPILER = shutil.which(os.environ.get("CXX", "g++").split()[0]) is None


@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler")
@pytest.mark.skipif(os.environ.get("RTL_KERNELS_NO_CPU") == "1", reason="RTL_KERNELS_NO_CPU=1")
def test_where_there_is_a_compiler_the_cpu_backend_is_built():
    assert cpu.unavailable is None
