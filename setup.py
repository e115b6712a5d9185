"""Builds `bacon_fast._C` from csrc/: C++ always, CUDA when nvcc and a CUDA build of torch are found (no GPU needed).

Environment: BACON_FAST_CUDA=0 leaves CUDA out; TORCH_CUDA_ARCH_LIST chooses the architectures; BACON_FAST_SANITIZE=1
builds what `make sanitize` runs.
"""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# setuptools defines signed overflow by -fwrapv, and UBSan looks at casts of floats only when asked. The checks of vptr
# would need type information that torch does not export.
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", "-fno-sanitize-recover=all", "-fno-sanitize=vptr"]
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"


def find_cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, else /usr/local/cuda, else the folder above the nvcc on PATH."""
    candidates = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for candidate in candidates:
        # A wrapper script named nvcc is no toolkit: the runtime header must be there too.
        if candidate and (Path(candidate) / "bin/nvcc").exists() and list(Path(candidate).rglob("cuda_runtime.h")):
            return Path(candidate)
    return None


CUDA_HOME = find_cuda_home() if os.environ.get("BACON_FAST_CUDA", "1") != "0" else None
if CUDA_HOME is not None:
    # torch reads both variables when cpp_extension is imported, so they are set before.
    os.environ["CUDA_HOME"] = str(CUDA_HOME)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
# Two compilers at a time on a small machine: one nvcc for four architectures needs about 2 GB.
os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))

import torch  # noqa: E402
from setuptools import setup  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402


def extension():
    use_cuda = CUDA_HOME is not None and torch.version.cuda is not None
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    # No -march=native: a wheel must run elsewhere. Hot loops have one file per instruction set instead.
    # at::parallel_for is a template that runs on one thread unless its caller is compiled with OpenMP.
    cxx_flags = ["-O3", "-std=c++20", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno", "-fopenmp"]
    link_flags = ["-fopenmp"]
    if os.environ.get("BACON_FAST_SANITIZE") == "1":
        cxx_flags += [SANITIZERS, *SANITIZE]
        link_flags += [SANITIZERS]
    include_dirs = [str(ROOT / "csrc")]
    if not use_cuda:
        return CppExtension(
            "bacon_fast._C",
            sources,
            include_dirs=include_dirs,
            extra_compile_args={"cxx": cxx_flags},
            extra_link_args=link_flags,
        )
    sources += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cu"))
    return CUDAExtension(
        "bacon_fast._C",
        sources,
        include_dirs=include_dirs,
        define_macros=[("BACON_FAST_WITH_CUDA", None)],
        extra_compile_args={"cxx": cxx_flags, "nvcc": ["-O3", "-std=c++20", "--threads=2"]},
        extra_link_args=link_flags,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
