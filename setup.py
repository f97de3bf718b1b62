"""Build script; the metadata is in pyproject.toml.

The compiled CPU backend is built where there is a C++ compiler; without one, or with RTL_KERNELS_NO_CPU=1, the package
installs without it and runs on the reference.
"""

import os
import platform
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra"]


def levels(machine: str) -> dict[str, list[str]]:
    """The kernels are one source compiled for each instruction set; what runs is chosen when the library is loaded."""
    if machine not in ("x86_64", "AMD64"):
        return {"level_baseline.cpp": []}
    return {
        "level_baseline.cpp": [],
        "level_avx2.cpp": ["-mavx2", "-mfma"],
        "level_avx512.cpp": [
            *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx512cd", "-mfma"),
            "-mprefer-vector-width=512",
        ],
    }


def why_not() -> str | None:
    """Why the extension is not built, or None."""
    if os.environ.get("RTL_KERNELS_NO_CPU") == "1":
        return "RTL_KERNELS_NO_CPU=1"
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}; set CXX)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not installed (pip needs --no-build-isolation)"
    return None


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            """Compile the levels, each with its own flags, then the rest with torch's."""
            folder = Path(self.build_temp) / "levels"
            folder.mkdir(parents=True, exist_ok=True)
            compiler = os.environ.get("CXX", "g++").split()
            headers = [*glob("csrc/cpu/kernels*.h"), "setup.py"]
            running = []
            for source, flags in levels(platform.machine()).items():
                built = folder / f"{Path(source).stem}.o"
                path = f"csrc/cpu/{source}"
                if not built.exists() or built.stat().st_mtime < max(os.path.getmtime(p) for p in (path, *headers)):
                    command = [*compiler, *FLAGS, *flags, "-c", path, "-o", str(built)]
                    running.append((command, subprocess.Popen(command)))
                self.extensions[0].extra_objects.append(str(built))
            for command, process in running:
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, command)
            super().build_extensions()

    sources = sorted({"csrc/registration.cpp", *glob("csrc/cpu/*.cpp")} - set(glob("csrc/cpu/level_*.cpp")))
    module = CppExtension(
        "rtl_kernels._cpu",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=[*FLAGS, "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        depends=glob("csrc/**/*.h", recursive=True),
        py_limited_api=True,  # no Python is called: one library for every version
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":  # which it is for setuptools and pip; tests/cpu/check.py reads the flags
    reason = why_not()
    if reason is not None:
        print(f"rtl_kernels: the compiled CPU backend is not built: {reason}", file=sys.stderr)
    setup(**({} if reason is not None else extension()))
