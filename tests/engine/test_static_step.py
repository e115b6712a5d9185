"""A step is a static program on the device: what a CUDA graph needs, shown without a GPU.

On the CPU every operation of a step is seen: none reads a value, has a shape that depends on one, draws from torch's
generators, or makes a tensor from Python numbers. And the step is traced as it would run on a GPU, with tensors that
have a device and no values.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from no_synchronization import NoSynchronization
from run_cases import tiny
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bacon_fast import _C
from bacon_fast.engine.build import build_optimizer
from bacon_fast.engine.meter import Meter
from bacon_fast.engine.step import TrainStep
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods import METHODS
from bacon_fast.ops import augment

# Of torch's generators, whose state a run does not save; and of shapes that depend on values.
DRAWS = {"rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "native_dropout"}
DRAWS |= {f"{name}_" for name in ("bernoulli", "normal", "uniform", "random", "exponential", "geometric", "log_normal")}
DRAWS |= {f"{name}_like" for name in ("rand", "randn", "randint")}
DYNAMIC = {"repeat_interleave", "unique_dim", "unique_consecutive", "histogram", "masked_scatter_backward"}


class StaticProgram(NoSynchronization):
    """Refuses operations that a captured step must not call."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in DRAWS, f"{func} draws from a generator of torch"
        assert name not in DYNAMIC, f"the shape of {func} depends on values"
        assert name != "lift_fresh", "a tensor made of Python numbers would be copied from the host"
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name in ("_to_copy", "copy_"):
            devices = {t.device for t in (*args, result) if isinstance(t, Tensor)}
            assert len(devices) == 1, f"{func} between {devices} waits for the device"
        return result


def addresses(trainer: Trainer) -> dict[str, int]:
    """Copies of all that a step changes, by name."""
    program, tensors = trainer.program, {}
    for owner in ("method", "ema", "diagnostics"):
        module = getattr(trainer, owner)
        tensors |= {f"{owner}.{name}": t for name, t in (*module.named_parameters(), *module.named_buffers())}
    tensors |= {"counter": program.counter, "rate": program.rate}
    tensors |= {f"sums {phase}": sums for phase, (_, sums, _) in trainer.meter._sums.items()}
    for i, state in enumerate(trainer.optimizer.state.values()):
        tensors |= {f"optimizer {i}.{name}": t for name, t in state.items() if isinstance(t, Tensor)}
    for name in ("labeled_sampler", "unlabeled_sampler"):
        if (sampler := getattr(trainer.batches, name)) is not None:
            tensors[name] = sampler.order
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_every_phase_are_static(tmp_path, method, monkeypatch):
    trainer, run, phases = Trainer(tiny(tmp_path, method=method, batch_size=4, steps=8)), TrainStep.run, set()

    def watched(program: TrainStep, phase):
        phases.add(phase)
        with StaticProgram():
            return run(program, phase)

    monkeypatch.setattr(TrainStep, "run", watched)
    known, generation = {}, 0
    for step in range(8):
        trainer.train_step()
        found = addresses(trainer)
        if trainer.generation == generation:
            moved = [name for name, address in known.items() if found.get(name) != address]
            assert not moved, f"moved in step {step}: {moved}"
        known, generation = found, trainer.generation
    trainer.logger.close()
    assert phases == {trainer.method.phase(step) for step in range(8)}
    with pytest.raises(AssertionError, match="reads the device"), StaticProgram():
        trainer.program.counter.item()


@pytest.mark.parametrize(("optimizer", "precision"), [("adam", "fp16"), ("sgd", "bf16")])
def test_other_recipes_are_static(tmp_path, optimizer, precision):
    config = {"method": "supervised", "lr_schedule": "cosine", "ema_buffers": "average"}
    trainer = Trainer(tiny(tmp_path, optimizer=optimizer, precision=precision, **config))
    trainer.train_step()  # creates Adam's state and the loss scale
    trainer.logger.close()
    known = addresses(trainer)
    for step in (1, 2):
        phase = trainer.program.prepare(step)
        with StaticProgram():
            trainer.program.run(phase)
    assert addresses(trainer) == known


@contextmanager
def on_a_gpu_that_is_not_there(trainer: Trainer) -> Iterator[TrainStep]:
    """The step of a run whose tensors all are on a CUDA device and have no values."""

    def move(tensor: Tensor) -> Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

    def move_module(module: nn.Module) -> nn.Module:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(move(parameter), parameter.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = move(buffer)
        return module

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*CUDA is not available.*")  # of autocast
        batches, method = trainer.batches, move_module(trainer.method)
        batches.device = torch.device("cuda")
        for name, value in vars(batches).items():
            if isinstance(value, Tensor):
                setattr(batches, name, move(value))
            elif isinstance(value, nn.Module):
                move_module(value)
        optimizer = build_optimizer(trainer.config, method)
        parts = (batches, optimizer, move_module(trainer.ema), move_module(trainer.diagnostics))
        yield TrainStep(trainer.config, method, method, *parts, Meter(batches.device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU tests/gpu/test_graph_gpu.py captures the step itself")
@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, method, monkeypatch):
    """Traces the step as it runs on a GPU: Triton's kernels, and CUDA C++ by the shapes of its results. Autograd's
    engine cannot run without a device.
    """
    monkeypatch.setattr(_C, "built_with_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")  # of which no times are known
    monkeypatch.setattr(augment, "why_not", lambda images: None)
    trainer = Trainer(tiny(tmp_path, method=method, steps=8))
    trainer.logger.close()
    phases = {trainer.method.phase(step) for step in range(8)}

    def backward(total: Tensor, gradient: Tensor) -> None:
        assert total.device.type == "cuda" and total.grad_fn is not None
        assert (gradient.device, gradient.dtype, gradient.shape) == (total.device, total.dtype, total.shape)
        for parameter in trainer.method.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None

    with on_a_gpu_that_is_not_there(trainer) as program:
        monkeypatch.setattr(Tensor, "backward", backward)
        for _ in range(2):  # the first step of a phase allocates its sums
            with StaticProgram():
                results = [program.run(phase) for phase in phases]
        for value in (v for result in results for part in result for v in part.values()):
            assert value.device.type == "cuda" and value.dim() == 0
