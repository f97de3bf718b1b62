"""Build script; the metadata is in pyproject.toml.

The compiled CPU backend is built where there is a C++ compiler; without one, or with RTL_KERNELS_NO_CPU=1, the package
installs without it and runs on the reference.

The CUDA backend is built where there is nvcc (on PATH, in CUDA_HOME, or in /usr/local/cuda) and a PyTorch with CUDA,
whether or not there is a GPU, for the architectures that RTL_KERNELS_CUDA_ARCHS lists ("80;90"; default: all that are
verified). RTL_KERNELS_FORCE_CUDA=1 makes it an error that it cannot be built, and builds it for a PyTorch without CUDA
too: the library goes through the stable ABI and serves another one. RTL_KERNELS_NO_CUDA=1 leaves it out.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

FLAGS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", "-Wall", "-Wextra"]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_ARCHITECTURES = "80;86;89;90;100"


def instruction_sets(machine: str) -> dict[str, list[str]]:
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
    """Why nothing can be compiled against torch, or None."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler}; set CXX)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError:
        return "torch is not installed (pip needs --no-build-isolation)"
    return None


def why_not_cpu() -> str | None:
    """Why the CPU backend is not built, or None."""
    return "RTL_KERNELS_NO_CPU=1" if os.environ.get("RTL_KERNELS_NO_CPU") == "1" else why_not()


def find_nvcc() -> str | None:
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    on_path = shutil.which("nvcc")
    found = [f"{home}/bin/nvcc" for home in homes] + [on_path or "", "/usr/local/cuda/bin/nvcc"]
    return next((path for path in found if os.path.isfile(path)), None)


def why_not_cuda() -> str | None:
    """Why the CUDA backend is not built, or None."""
    if os.environ.get("RTL_KERNELS_NO_CUDA") == "1":
        return "RTL_KERNELS_NO_CUDA=1"
    reason = why_not()
    if reason is None and find_nvcc() is None:
        reason = "no nvcc (set CUDA_HOME)"
    if os.environ.get("RTL_KERNELS_FORCE_CUDA") == "1":
        if reason is not None:
            sys.exit(f"rtl_kernels: RTL_KERNELS_FORCE_CUDA=1, but the CUDA backend cannot be built: {reason}")
        return None
    if reason is None:
        import torch

        if torch.version.cuda is None:
            reason = (
                f"PyTorch {torch.__version__} is built without CUDA (RTL_KERNELS_FORCE_CUDA=1 builds it all the same)"
            )
    return reason


def cuda_libraries(nvcc: str) -> list[str]:
    """Where nvcc itself would link from; nvcc on PATH may be a script or a link that lies elsewhere."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "csrc/cuda/launch.cu"], capture_output=True, text=True, check=True)
    return re.findall(r'"-L([^"]+)"', plan.stderr)


def cuda_architectures() -> list[int]:
    """What RTL_KERNELS_CUDA_ARCHS lists, ascending."""
    text = os.environ.get("RTL_KERNELS_CUDA_ARCHS") or CUDA_ARCHITECTURES
    names = [name.strip().removeprefix("sm_").replace(".", "") for name in re.split(r"[;,\s]+", text.strip())]
    if not all(name.isdigit() and int(name) >= 80 for name in names):
        sys.exit(f"rtl_kernels: RTL_KERNELS_CUDA_ARCHS is {text!r}, expected architectures from 80 on, as in '80;90'")
    return sorted({int(name) for name in names})


def extension(cpu: bool, cuda: bool) -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        def build_extensions(self) -> None:
            """Compile the levels and the CUDA kernels, each with flags of their own, then the rest with torch's."""
            running = []
            for module in self.extensions:
                jobs = levels(Path(self.build_temp)) if module.name.endswith("_cpu") else kernels(Path(self.build_temp))
                for built, command, sources in jobs:
                    built.parent.mkdir(parents=True, exist_ok=True)
                    if not built.exists() or built.stat().st_mtime < max(map(os.path.getmtime, (*sources, "setup.py"))):
                        running.append((command, subprocess.Popen(command)))
                    module.extra_objects.append(str(built))
            for command, process in running:
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, command)
            super().build_extensions()

    def module(name: str, sources: list[str], **options) -> CppExtension:
        defines = [f"-D{key}={value}" for key, value in options.pop("defines", {}).items()]
        return CppExtension(
            f"rtl_kernels.{name}",
            sources,
            include_dirs=[str(Path("csrc").resolve())],
            extra_compile_args=[*FLAGS, STABLE_ABI, *defines],
            depends=glob("csrc/**/*.h", recursive=True),
            py_limited_api=True,  # no Python is called: one library for every version
            **options,
        )

    modules = []
    if cpu:
        sources = {"csrc/registration.cpp", *glob("csrc/cpu/*.cpp")} - set(glob("csrc/cpu/level_*.cpp"))
        modules.append(module("_cpu", sorted(sources)))
    if cuda:
        modules.append(
            module(
                "_cuda",
                ["csrc/registration_cuda.cpp"],
                defines={"USE_CUDA": 1, "RTL_CUDA_ARCHITECTURES": f'"{",".join(map(str, cuda_architectures()))}"'},
                library_dirs=cuda_libraries(find_nvcc() or "nvcc"),
                # CUDA's runtime is linked in; what torch's own CUDA library offers is found through libtorch.
                extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lcudart_static", "-lrt", "-lpthread", "-ldl"],
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


def levels(folder: Path) -> list[tuple[Path, list[str], list[str]]]:
    """(object, command, sources) of the CPU kernels, for each instruction set."""
    compiler = os.environ.get("CXX", "g++").split()
    jobs = []
    for source, flags in instruction_sets(platform.machine()).items():
        path, built = f"csrc/cpu/{source}", folder / "levels" / f"{Path(source).stem}.o"
        command = [*compiler, *FLAGS, *flags, "-c", path, "-o", str(built)]
        jobs.append((built, command, [path, "csrc/cpu/kernels.h", *glob("csrc/cpu/*_impl.h")]))
    return jobs


def kernels(folder: Path) -> list[tuple[Path, list[str], list[str]]]:
    """The same of the CUDA kernels: machine code for every architecture, and PTX of the last for what comes later."""
    wanted = cuda_architectures()
    built = folder / "cuda" / f"kernels_{'_'.join(map(str, wanted))}.o"
    command = [find_nvcc() or "nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc/cuda"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
    command += [f"-gencode=arch=compute_{wanted[-1]},code=compute_{wanted[-1]}", "--threads", "0"]
    return [(built, [*command, "-c", "csrc/cuda/launch.cu", "-o", str(built)], glob("csrc/cuda/*"))]


if __name__ == "__main__":
    reasons = {"CPU": why_not_cpu(), "CUDA": why_not_cuda()}
    for backend, reason in reasons.items():
        if reason is not None:
            print(f"rtl_kernels: the compiled {backend} backend is not built: {reason}", file=sys.stderr)
    wanted = [reason is None for reason in reasons.values()]
    setup(**(extension(*wanted) if any(wanted) else {}))
