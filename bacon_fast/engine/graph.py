"""The whole training step as one CUDA graph: captured once for each phase of the method, then one launch a step."""

from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Literal, Protocol

import torch
from torch import Tensor

from bacon_fast.engine.step import TrainStep
from bacon_fast.methods.gather import num_ranks

Result = tuple[dict[str, Tensor], dict[str, Tensor]]

# Steps of a phase before its capture. In these, libraries choose algorithms and allocate, and kernels are compiled.
WARM_UP = 3


def use_graph(choice: Literal["auto", "on", "off"], device: torch.device) -> bool:
    """Whether a run's steps become graphs. Raises ValueError, with the reason, for "on" where they cannot."""
    reason = None
    if device.type != "cuda":
        reason = f"a CUDA graph needs a CUDA device, and this run is on {device}"
    elif num_ranks() > 1:
        reason = "under torchrun the gradients' communication is not captured"
    if choice == "on" and reason is not None:
        raise ValueError(f"graph: {reason}")
    return choice != "off" and reason is None


class Capture(Protocol):
    """How a step is recorded."""

    def __call__(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Records what `run` would do. Returns a function that repeats it, and the tensors that it writes."""

    def reset(self) -> None:
        """Drops all recordings."""


class CudaCapture:
    """Records on the current stream, which must not be the default one.

    All graphs of a run share their memory: they replay one after the other, and none reads what another left there.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # A broken capture's graph goes only with the run: torch's cache of pinned host memory still knows its pool, and
        # asks about it when it next hands out a block.
        self._broken: list[torch.cuda.CUDAGraph] = []

    def __call__(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as TensorBoard's, may use the GPU meanwhile.
        options = {"stream": torch.cuda.current_stream(), "capture_error_mode": "thread_local"}
        try:
            with torch.cuda.graph(graph, self._pool, **options):
                result = run()
        except Exception:
            self._broken.append(graph)
            # Best effort: the eager step draws nothing from torch's generators and works without this.
            with suppress(Exception):
                self._clear_broken_capture()
            raise
        return graph.replay, result

    def _clear_broken_capture(self) -> None:
        """Undoes what torch 2.11 leaves behind when a capture ends in an error: allocations still go to its pool, and
        the generator believes that it is captured, until a capture succeeds."""
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # where the capture did not even begin
            torch._C._cuda_endAllocateToPool(device, self._pool)
            torch._C._cuda_releasePool(device, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
            torch.zeros((), device="cuda")

    def reset(self) -> None:
        # Memory cannot be shared again after its last graph is gone, and must not go while a replay still runs.
        torch.cuda.current_stream().synchronize()
        self._pool = torch.cuda.graph_pool_handle()


class GraphedStep:
    """Runs the steps of `program`: the first `WARM_UP` of each phase eagerly, then by replaying the phase's graph.

    Every step counts once: warm-up steps are steps of the run, and a capture executes nothing. If a capture fails, the
    reason is reported, and this and all later steps run eagerly.

    Args:
        program: the step. Its state must be in place: a graph holds addresses.
        capture: how a step is recorded.
        strict: raise if a capture fails.
        report: takes the message when a capture fails.
    """

    def __init__(
        self, program: TrainStep, capture: Capture, *, strict: bool = False, report: Callable[[str], None] = print
    ) -> None:
        self.program = program
        self._capture, self._strict, self._report = capture, strict, report
        self._warm: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Callable[[], None], Result]] = {}
        self._addresses: list[int] = []
        self._failed = False

    def __call__(self, step: int) -> Result:
        """Runs the step that follows `step` completed ones.

        Returns losses and statistics as 0-d tensors, which the next step of the phase may overwrite.
        """
        phase = self.program.prepare(step)
        if phase not in self._graphs and self._warm[phase] >= WARM_UP and not self._failed:
            self._add(phase)
        if phase not in self._graphs:
            self._warm[phase] += 1
            return self.program.run(phase)
        replay, result = self._graphs[phase]
        replay()
        return result

    def renew(self) -> None:
        """After work between steps: captures every phase anew if that moved a parameter or buffer."""
        if self._graphs and self._addresses != self._present_addresses():
            self._capture.reset()
            self._graphs.clear()

    def _present_addresses(self) -> list[int]:
        modules = (self.program.method, self.program.ema)
        return [tensor.data_ptr() for m in modules for tensor in (*m.parameters(), *m.buffers())]

    def _add(self, phase: Hashable) -> None:
        broken: Exception | None = None

        def run() -> Result:
            nonlocal broken
            try:
                return self.program.run(phase)
            except Exception as error:
                broken = error  # ending the capture raises another one, which does not say why
                raise

        try:
            self._graphs[phase] = self._capture(run)
            self._addresses = self._present_addresses()
        except Exception as error:
            self.program.forget_broken_step()
            error = broken or error
            reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
            if self._strict:
                raise RuntimeError(f"graph: the step could not be captured: {reason}") from error
            self._failed = True
            self._graphs.clear()
            self._report(f"the step could not be captured as a CUDA graph and runs eagerly, more slowly: {reason}")
