"""Builds `bacon_fast._C` from csrc/, where that is possible: an installation without it runs on PyTorch and Triton.

Environment:
    BACON_FAST_CUDA: unset, the CUDA sources are compiled where a GPU is visible, for its architecture; 1, for all
        architectures, with or without a GPU, and whatever is missing then is an error; 0, not at all.
    BACON_FAST_SANITIZE: 1, with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`).
    TORCH_CUDA_ARCH_LIST: the architectures, instead of those.
    CUDA_HOME, CXX, MAX_JOBS: as PyTorch understands them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from setuptools import setup

ROOT = Path(__file__).resolve().parent
ALL_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
FORCED = os.environ.get("BACON_FAST_CUDA") == "1"
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
# setuptools defines signed overflow by -fwrapv. To check types of objects would need what PyTorch does not export.
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]


def cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, else /usr/local/cuda, else the folder above the nvcc on PATH."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in candidates:
        # A wrapper script named nvcc is no toolkit: the runtime header must be there too.
        if candidate and (Path(candidate) / "bin/nvcc").exists() and list(Path(candidate).rglob("cuda_runtime.h")):
            return Path(candidate)
    return None


def visible_architectures() -> str:
    """Of the GPUs of this machine, as TORCH_CUDA_ARCH_LIST has them; "" without one."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
        found = re.findall(r"^\d+\.\d+$", answer, re.MULTILINE)
    except (OSError, subprocess.SubprocessError):  # a container may have the driver without the program
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = ["{}.{}".format(*torch.cuda.get_device_capability(index)) for index in range(count)]
    return ";".join(sorted(set(found)))


def choose_cuda() -> tuple[Path | None, str]:
    """The toolkit to compile the CUDA sources with, or None and the reason why they are left out."""
    if os.environ.get("BACON_FAST_CUDA") == "0":
        return None, "BACON_FAST_CUDA=0"
    architectures = ALL_ARCHITECTURES if FORCED else visible_architectures()
    home = cuda_home()
    reason = ""
    if not architectures:
        reason = "no GPU is visible (BACON_FAST_CUDA=1 compiles for all)"
    elif torch.version.cuda is None:
        reason = f"PyTorch {torch.__version__} is built without CUDA"
    elif home is None:
        reason = "no CUDA toolkit was found (nvcc, cuda_runtime.h)"
    if reason:
        if FORCED:
            sys.exit(f"error: BACON_FAST_CUDA=1, but {reason}")
        return None, reason
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures)
    return home, ""


CUDA_HOME, WITHOUT_CUDA = choose_cuda()
if CUDA_HOME is not None:
    os.environ["CUDA_HOME"] = str(CUDA_HOME)  # cpp_extension reads it when it is imported
# Two compilers at a time on a small machine: one nvcc for four architectures needs about 2 GB.
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
# An environment that is not activated has its ninja beside its Python.
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, get_cxx_compiler  # noqa: E402


def compiles(*flags: str, source: str = "int main() { return 0; }") -> bool:
    """Whether the C++ compiler makes a program of the source."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "probe.cpp").write_text(source)
        command = [*get_cxx_compiler().split(), *flags, "probe.cpp", "-o", "probe"]
        try:
            return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
        except OSError:
            return False


def extension():
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    # No -march=native: a wheel must run elsewhere. Hot loops have one file per instruction set instead.
    # Without debug information, which Python's own flags ask for, the library has a twentieth of the size.
    cxx_flags = ["-O3", "-g0", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno"]
    link_flags = ["-Wl,-s"] if sys.platform == "linux" else []
    # at::parallel_for is a template that runs on one thread unless its caller is compiled with OpenMP.
    if compiles("-fopenmp", source="#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"):
        cxx_flags.append("-fopenmp")
        link_flags.append("-fopenmp")
    if os.environ.get("BACON_FAST_SANITIZE") == "1":
        cxx_flags += [SANITIZERS, *SANITIZE]
        link_flags = [SANITIZERS, *(flag for flag in link_flags if flag != "-Wl,-s")]  # with names in the reports
    options = {"include_dirs": [str(ROOT / "csrc")], "extra_link_args": link_flags, "optional": not FORCED}
    if CUDA_HOME is None:
        return CppExtension("bacon_fast._C", sources, extra_compile_args={"cxx": cxx_flags}, **options)
    return CUDAExtension(
        "bacon_fast._C",
        sources + sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu")),
        define_macros=[("BACON_FAST_WITH_CUDA", None)],
        extra_compile_args={"cxx": cxx_flags, "nvcc": ["-O3", "-std=c++20", "--threads=2"]},
        **options,
    )


class Build(BuildExtension):
    """Builds the extension or says in one line why there is none; an older one does not stay in its place."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # what there is may be of another BACON_FAST_CUDA, however old the sources are

    def build_extensions(self) -> None:
        try:
            if not compiles():
                raise RuntimeError(f"the C++ compiler {get_cxx_compiler()!r} was not found or does not work")
            super().build_extensions()
        except Exception as error:
            if FORCED:
                raise
            Path(self.get_ext_fullpath("bacon_fast._C")).unlink(missing_ok=True)
            reason = str(error).strip().splitlines()[-1]
            print(f"warning: bacon_fast is installed without its native extension, so it is slower: {reason}")
        else:
            if CUDA_HOME is None:
                print(f"bacon_fast._C is built without CUDA: {WITHOUT_CUDA}")

    def copy_extensions_to_source(self) -> None:  # of a build in place
        (ROOT / self.get_ext_filename("bacon_fast._C")).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
