"""What can be said of the CUDA C++ kernels without a GPU: compiled ahead of time, read back, tabulated.

    python benchmarks/gpu_static_cuda.py [--arch sm_80 ...] [--write benchmarks/results/gpu_static.json]

For every kernel and architecture: registers, spills, shared memory, the occupancy these allow, how many tensor-core
instructions the code has, and what share of its loads from global memory (asynchronous copies too) is 128 bits wide.
Counts are of instructions in the program, not of instructions executed. Rows of other kernels in the file stay.

Needs nvcc (on PATH, in CUDA_HOME, or under /usr/local/cuda*), nvdisasm (beside nvcc, on PATH, in RTL_CUDA_TOOLS, or
inside an installed Triton), g++ and c++filt.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "simt"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor, from the CUDA programming guide; shared memory in KiB."""

    warps: int
    blocks: int
    shared: int
    shared_block: int
    registers: int = 65536


ARCHITECTURES = {
    "sm_80": Architecture(64, 32, 164, 163),
    "sm_86": Architecture(48, 16, 100, 99),
    "sm_89": Architecture(48, 24, 100, 99),
    "sm_90": Architecture(64, 32, 228, 227),
    "sm_100": Architecture(64, 32, 228, 227),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str
    threads: int
    shared_bytes: int
    function: str  # as C++ spells it, without spaces and namespaces


def _folders() -> list[Path]:
    folders = [Path(os.environ[key]) for key in ("RTL_CUDA_TOOLS",) if key in os.environ]
    folders += [Path(os.environ[key]) / "bin" for key in ("CUDA_HOME", "CUDA_PATH") if key in os.environ]
    folders += sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return folders


@functools.cache
def find_tool(name: str) -> str | None:
    """Path of a CUDA tool, or None."""
    found = shutil.which(name)
    if found:
        return found
    return next((str(folder / name) for folder in _folders() if (folder / name).is_file()), None)


def why_not(*tools: str) -> str | None:
    """Which of these tools are missing, in words, or None."""
    missing = [tool for tool in tools if not (find_tool(tool) if tool.startswith("nv") else shutil.which(tool))]
    return f"not found: {', '.join(missing)}" if missing else None


def _cached(name: str, *parts: str) -> Path:
    digest = hashlib.sha256()
    for path in sorted(CUDA.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for part in parts:
        digest.update(part.encode() + b"\0")
    folder = ROOT / "build" / "cuda" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def _normal(function: str) -> str:
    return function.replace(" ", "").replace("rtl::", "")


@functools.cache
def catalogue() -> tuple[Kernel, ...]:
    """Every kernel there is, from RTL_KERNELS in csrc/cuda/kernels.cuh."""
    with tempfile.TemporaryDirectory() as work:
        sources = [str(EMULATOR / name) for name in ("catalogue.cpp", "simt.cpp", "simt_copy.cpp")]
        include = [f"-I{EMULATOR}", f"-I{CUDA}"]
        subprocess.run(["g++", "-std=c++17", "-O0", *include, *sources, "-o", f"{work}/catalogue"], check=True)
        listing = subprocess.run([f"{work}/catalogue"], check=True, capture_output=True, text=True).stdout
    rows = [line.split("\t") for line in listing.splitlines()]
    return tuple(Kernel(name, int(threads), int(shared), _normal(function)) for name, threads, shared, function in rows)


def compile_cubin(arch: str) -> tuple[Path, str]:
    """(cubin, what ptxas said) of all kernels for one architecture."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("nvcc not found: set CUDA_HOME")
    options = ["-std=c++17", f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{CUDA}"]
    cubin = _cached(f"{arch}.cubin", nvcc, *options)
    log = cubin.with_suffix(".log")
    with cubin.with_suffix(".lock").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)  # another process may want the same
        if not (cubin.exists() and log.exists()):
            command = [nvcc, *options, str(CUDA / "launch.cu"), "-o", f"{cubin}.new"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"nvcc failed for {arch}:\n{result.stderr[-4000:]}")
            log.write_text(result.stderr)
            os.replace(f"{cubin}.new", cubin)
    return cubin, log.read_text()


def _demangle(symbols: Iterable[str]) -> dict[str, str]:
    """Mangled -> the function's name alone, normalised as in `Kernel.function`."""
    listed = list(symbols)
    result = subprocess.run(["c++filt"], input="\n".join(listed), check=True, capture_output=True, text=True)
    names = {}
    for symbol, text in zip(listed, result.stdout.splitlines(), strict=True):
        names[symbol] = _normal(text.removeprefix("void ").rpartition("(")[0])
    return names


def _ptxas(log: str) -> dict[str, tuple[int, int, int]]:
    """Symbol -> (registers, spill bytes stored and loaded, bytes of static shared memory)."""
    found = {}
    symbol, spill = "", 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            symbol, spill = match[1], 0
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spill = int(match[1]) + int(match[2])
        elif symbol and (match := re.search(r"Used (\d+) registers", line)):
            static = re.search(r"(\d+) bytes smem", line)
            found[symbol] = (int(match[1]), spill, int(static[1]) if static else 0)
            symbol = ""
    return found


def _instructions(cubin: Path) -> dict[str, tuple[int, int, int]]:
    """Symbol -> (tensor-core instructions, loads from global memory, those of 128 bits)."""
    nvdisasm = find_tool("nvdisasm")
    if nvdisasm is None:
        raise FileNotFoundError("nvdisasm not found: set RTL_CUDA_TOOLS to its folder")
    listing = subprocess.run([nvdisasm, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    counts: dict[str, list[int]] = {}
    now = [0, 0, 0]
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            now = counts.setdefault(match[1], [0, 0, 0])
            continue
        match = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line)
        if not match:
            continue
        operation = match[1]
        if re.match(r"(HMMA|HGMMA|UTC\w*MMA)", operation):
            now[0] += 1
        elif re.match(r"(LDG|LDGSTS)\b", operation):
            now[1] += 1
            now[2] += ".128" in operation
    return {symbol: (tensor, loads, wide) for symbol, (tensor, loads, wide) in counts.items()}


def occupancy(arch: str, threads: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that can be resident: registers are handed out by 256 a warp, and every block
    takes 1 KiB of shared memory besides its own."""
    limits = ARCHITECTURES[arch]
    warps = threads // 32
    by_registers = limits.registers // (-(-registers * 32 // 256) * 256) // warps
    by_shared = limits.shared * 1024 // (-(-shared_bytes // 128) * 128 + 1024)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks) * warps / limits.warps


@functools.cache
def report(arch: str) -> list[dict[str, Any]]:
    """One row a kernel, as DESIGN.md §8 has them."""
    cubin, log = compile_cubin(arch)
    ptxas, code = _ptxas(log), _instructions(cubin)
    symbols = {function: symbol for symbol, function in _demangle(ptxas).items()}
    kernels = catalogue()
    if {kernel.function for kernel in kernels} != set(symbols):
        odd = {kernel.function for kernel in kernels} ^ set(symbols)
        raise RuntimeError(f"the compiled kernels are not those of RTL_KERNELS: {sorted(odd)}")
    rows = []
    for kernel in kernels:
        registers, spill, static = ptxas[symbols[kernel.function]]
        tensor, loads, wide = code[symbols[kernel.function]]
        shared = kernel.shared_bytes + static
        rows.append(
            {
                "kernel": f"cuda.{kernel.name}",
                "arch": arch,
                "registers": registers,
                "spill_bytes": spill,
                "shared_bytes": shared,
                "occupancy": round(occupancy(arch, kernel.threads, registers, shared), 4),
                "tensor_instructions": tensor,
                "wide_load_share": round(wide / loads, 4) if loads else 0.0,
            }
        )
    return rows


def version() -> str:
    """nvcc's."""
    said = subprocess.run([find_tool("nvcc") or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    (found,) = re.findall(r"\bV([\d.]+)", said)
    return str(found)


def merge_rows(path: Path, rows: Iterable[dict[str, Any]], made: dict[str, str] | None = None) -> None:
    """Put rows into a file of them: those of the same kernel and architecture are replaced, all others stay.

    `made`: how and when, by what.
    """
    report = json.loads(path.read_text()) if path.exists() else {"rows": []}
    old = report["rows"]
    others = [row for row in old if not row["kernel"].startswith("cuda.")]  # Triton's, of several layers each
    mine = [row for row in old if row["kernel"].startswith("cuda.")]
    merged = {(row["kernel"], row["arch"]): row for row in [*mine, *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    report["rows"] = [merged[key] for key in sorted(merged)] + others
    if made:
        report["made"] = report.get("made", {}) | {"cuda": made}
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Markdown."""
    names = ["kernel", "arch", "registers", "spill_bytes", "shared_bytes", "occupancy", "tensor_instructions"]
    names.append("wide_load_share")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--write", type=Path, help="merge the rows into this gpu_static.json")
    options = parser.parse_args()
    rows = [row for arch in options.arch for row in report(arch)]
    print(table(rows))
    if options.write:
        today = datetime.now(timezone.utc).date().isoformat()
        command = "python benchmarks/gpu_static_cuda.py --write benchmarks/results/gpu_static.json"
        merge_rows(options.write, rows, {"command": command, "date": today, "version": version()})


if __name__ == "__main__":
    main()
