"""Writes down the Triton launches of the gate and of the benchmarks, on a machine without a GPU.

    python -m benchmarks.gpu_bundle.record FILE [pytest's -k expression]

The tests and the benchmarks themselves run, on tensors that say they are on a GPU and are not; what they would launch
is recorded instead of executed. So every comparison of theirs fails; what they launch until then is what is wanted.
"""

import contextlib
import io
import pickle
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from bacon_fast.kernels import aot, launch

ROOT = Path(__file__).resolve().parents[2]
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(shared_memory_per_block_optin=227 * 1024)  # what a block of such a card may have
GATE = (ROOT / "benchmarks/gpu_gate.txt").read_text().replace("\n", " ")


def _on_cpu(value: object) -> object:
    """Another device for what names a CUDA device."""
    named = value.type if isinstance(value, torch.device) else value
    return "cpu" if isinstance(named, str) and named.split(":")[0] == "cuda" else value


class OnPaper(TorchFunctionMode):
    """Tensors are made on the CPU and say that they are on a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return torch.device("cuda", 0)
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return args[0]
        return func(*map(_on_cpu, args), **{name: _on_cpu(value) for name, value in (kwargs or {}).items()})


def pretend() -> None:
    """Makes torch.cuda look as if there were a GPU, where tests and benchmarks ask.

    Within an op no tensor says that it is on a GPU: its launcher is told the architecture.
    """
    launch.pretended = 10 * CAPABILITY[0] + CAPABILITY[1]
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: PROPERTIES
    for name in ("synchronize", "set_sync_debug_mode", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *arguments: None)
    autocast = torch.autocast
    torch.autocast = lambda device_type, **options: autocast(_on_cpu(device_type), **options)


def run_gate(expression: str) -> None:
    command = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no", "-k", expression]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = pytest.main([*command, str(ROOT / "tests/gpu")])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the gate's tests did not run:\n{printed.getvalue()[-3000:]}")
    print(printed.getvalue().strip().splitlines()[-1])


def run_tests_trainers() -> None:
    """Steps of the trainers of tests/gpu/test_graph_gpu.py, which there need streams and graphs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from run_cases import tiny

    from bacon_fast.engine.trainer import Trainer

    for precision in ("fp32", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(tiny(Path(folder), precision=precision, parts={"bacon.contrast_start": 0.0}))
            for _ in range(2):
                trainer.train_step()
            trainer.logger.close()


def run_losses() -> None:
    """Every arm of ours of benchmarks.loss."""
    from benchmarks.loss import all_cases, products_of

    for case in all_cases("cuda", quick=True):
        for name, build in case.arms.items():
            if name.startswith("bacon_fast"):
                with products_of(case.numbers):
                    build()()


def run_steps() -> None:
    """Steps of benchmarks.throughput's own arm, before and with the contrastive loss, and of its gate's precision."""
    from benchmarks.throughput.problem import make_config, make_trainer, repeat_digits

    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        config = make_config(repeat_digits(scratch), "cpu", backbone="wrn-28-2", threads=1)
        for precision in ("bf16", "fp32"):
            trainer = make_trainer(config, scratch, precision=precision)
            for _ in range(2):
                trainer.train_step()


def main() -> None:
    path, *expression = sys.argv[1:]
    work = [lambda: run_gate(*expression or [GATE])]
    if not expression:
        work += [run_tests_trainers, run_losses, run_steps]
    pretend()
    launches: dict[aot.Launch, None] = {}

    def record(kernel: object, arguments: tuple, *rest: object) -> None:
        launches.setdefault(aot.describe(kernel, arguments, *rest))
        for value in arguments:  # what the kernel would have written may be an index: zero is one
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                value.zero_()

    launch.recorder = record
    with OnPaper():
        for run in work:
            run()
            print(f"{len(launches)} distinct launches so far", flush=True)
    rows = [(item.kernel.fn.__module__, item.kernel.fn.__name__, *item[1:]) for item in launches]
    Path(path).write_bytes(pickle.dumps(rows))


if __name__ == "__main__":
    main()
