"""The gate before any speed: every arm must compute what we do. Float64 keeps rounding from hiding a mistake.

A peers' arm gets the batches, the state and ABC's masks of our reference backend. Over three steps it must give the
same losses, and then the same parameters, average, class centers and counts: on the CPU, where everything exists in
float64. Then the arm that will be timed, on its device, in its precision and with its own draws, must give the same
losses, as far as they need no draw. Our trainer is compared with one on the reference backend, in float32 and in the
precision to be timed.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bacon_fast.engine import build
from bacon_fast.engine.graph import WARM_UP
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods.outputs import Batch
from bacon_fast.reference.fixmatch_abc import bernoulli

from .loaders import HostBatch
from .ours import TrainerStep
from .peers import UsbStyleStep
from .problem import MIDDLE, Named, Problem, State, random_batch
from .step import Flags
from .vectorized import NAMES, VectorizedStep

STEPS = 3
# Of float64 steps, which hold the bank's float32 features and temperatures of integer counts: rounded by 6e-8. Losses
# and bank show little more. An update shows it times the curvature of the sharpened heads, once a step: up to 7e-4 of
# a tensor's largest element after three, in another tensor each run, from states that float32 convolutions on an H200
# have trained. What the gate is there for, as a wrong gradient, momentum, decay or average, is off by more than 1e-2.
LOSS_TOLERANCE, BANK_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-4, 5e-3
DRAWN = ("abc_labeled", "abc_unlabeled", "abc", "total")
TOLERANCES = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-2}


class RedGateError(RuntimeError):
    """An arm does not compute what we do."""


@dataclass(frozen=True)
class Truth:
    """Steps of the reference from a state.

    Attributes:
        batches, losses, end: of steps in float64, on batches smaller than the run's; the last is the state after them.
        whole_batch, whole_losses: a batch of the run's size, and the losses of a step on it.
    """

    seed: int
    state: State
    batches: list[Batch]
    losses: list[dict[str, float]]
    end: State
    whole_batch: Batch
    whole_losses: dict[str, float]


def truth_of(trainer: Trainer, state: State) -> Truth:
    """The steps of a trainer's method on the reference backend. Raises RedGateError where the state would let a wrong
    arm pass."""
    state.load(trainer)
    method, average = (copy.deepcopy(module).double().cpu() for module in (trainer.method, trainer.ema))
    optimizer = build.build_optimizer(trainer.config, method)
    size, losses = trainer.config.views.batch_size, []
    batches = [_exact(random_batch(trainer, 1000 + k, max(size // 4, 16))) for k in range(STEPS)]
    whole_batch = random_batch(trainer, 2000, size)
    with Flags().applied():
        with torch.no_grad():
            step = torch.tensor(MIDDLE, device=trainer.device)
            whole = copy.deepcopy(trainer.method)(whole_batch, step, method.phase(MIDDLE)).losses
        for k, batch in enumerate(batches):
            output = method(batch, torch.tensor(MIDDLE + k), method.phase(MIDDLE))
            optimizer.zero_grad()
            output.total.backward()
            optimizer.step(average=average.pairs(method.network))
            losses.append({name: value.item() for name, value in output.losses.items()})
            for name in ("pseudo_rate", "abc_rate", "reliable"):
                if not 0 < output.stats[name] < 1:
                    raise RedGateError(f"the state decides nothing: {name} is {output.stats[name].item()}")
    end = State.of(method, average.network)
    whole_losses = {name: value.item() for name, value in whole.items()}
    return Truth(trainer.config.seed, state, batches, losses, end, whole_batch, whole_losses)


def _exact(batch: Batch) -> Batch:
    tensors = {name: value.cpu() for name, value in vars(batch).items() if value is not None}
    return Batch(**(tensors | {"images": tensors["images"].double()}))


def split(batch: Batch) -> HostBatch:
    """A batch of ours as the peers' arms take it."""
    labeled, weak, strong = batch.images.split([batch.num_labeled, batch.num_unlabeled, batch.num_unlabeled])
    return HostBatch(batch.labeled_slots, batch.labels, labeled, batch.unlabeled_slots, weak, strong)


def our_draws(seed: int, step: int) -> Callable[[Tensor, int], Tensor]:
    """ABC's masks as our method draws them at a step."""
    return lambda probability, stream: bernoulli(
        probability, seed, torch.tensor(step, device=probability.device), stream
    )


def _compare(what: str, found: Named, expected: Named, tolerance: float) -> None:
    """Raises RedGateError unless every tensor is within ``tolerance`` of the largest element expected of it."""
    for name, value in expected.items():
        value = value.double()
        error = (found[name].detach().cpu().double() - value).abs().max().item()
        allowed = tolerance * max(value.abs().max().item(), 1e-6)
        if not error <= allowed:
            raise RedGateError(f"{what} {name} is off by {error:.1e}, allowed are {allowed:.1e}")


def _compare_losses(what: str, found: dict[str, float], expected: dict[str, float], tolerance: float) -> None:
    for name, value in found.items():
        if not abs(value - expected[name]) <= tolerance * max(abs(expected[name]), 1e-2):
            raise RedGateError(f"{what}: {name} is {value:.6g}, the reference's is {expected[name]:.6g}")


def _moved(start: Named, end: Named) -> Named:
    return {name: value.double() - start[name].double() for name, value in end.items() if value.is_floating_point()}


def check_steps(truth: Truth, update: Callable[[HostBatch, Callable], dict[str, float]], end: Callable) -> None:
    """Three steps of ``update(batch, draw)``, which returns losses; ``end()`` gives the state after them."""
    with Flags().applied():
        for k, batch in enumerate(truth.batches):
            found = update(split(batch), our_draws(truth.seed, MIDDLE + k))
            _compare_losses(f"step {k}", found, truth.losses[k], LOSS_TOLERANCE)
    state = end()
    for part in ("network", "averaged", "projection"):  # the differences, so that what did not move is seen
        start, expected = getattr(truth.state, part), getattr(truth.end, part)
        _compare(f"update of {part}", _moved(start, getattr(state, part)), _moved(start, expected), UPDATE_TOLERANCE)
    for name in ("centers", "class_counts", "selected_label", "written"):
        _compare("bank", {name: state.bank[name]}, {name: truth.end.bank[name]}, BANK_TOLERANCE)


def check_usb_style(problem: Problem, truth: Truth) -> None:
    """Arms A and B."""
    arm = UsbStyleStep(_on_cpu(problem), truth.state, workers=None, dtype=torch.float64)

    def update(batch: HostBatch, draw: Callable) -> dict[str, float]:
        losses = arm.update(batch, draw)
        return {name: losses[name] for name in ("total", "supervised", "unsupervised", "contrastive")}

    def end() -> State:
        bank = arm.bank
        buffers = {"centers": bank.centers, "class_counts": bank.counts}
        buffers |= {"selected_label": bank.label, "written": bank.written}
        return State(_host(arm.network), _host(arm.averaged), _host(arm.projection), _on_host(buffers))

    check_steps(truth, update, end)


def check_vectorized(problem: Problem, truth: Truth) -> None:
    """Arms C, D and E."""
    arm = VectorizedStep(_on_cpu(problem), truth.state, "fp32", batches=None, dtype=torch.float64)

    def update(batch: HostBatch, draw: Callable) -> dict[str, float]:
        arm.loss.draw = draw
        return dict(zip(NAMES, arm.update(batch).tolist()))

    def end() -> State:
        loss, buffers = arm.loss, _on_host(dict(arm.loss.named_buffers()))
        return State(_host(loss.network), _host(arm.averaged), _host(loss.projection), buffers)

    check_steps(truth, update, end)


def check_timed(losses: dict[str, float], truth: Truth, precision: str) -> None:
    """The first step of the arm that is to be timed, on a whole batch."""
    found = {name: value for name, value in losses.items() if name not in DRAWN and name in truth.whole_losses}
    _compare_losses(f"in {precision}", found, truth.whole_losses, TOLERANCES[precision])


def check_trainer(ours: TrainerStep, reference: TrainerStep, state: State, precision: str) -> None:
    """Arm F against the reference, both as trainers: three steps of their own batches, which are the same.

    On a GPU these are replays of a graph: a trainer's first steps, before it captures one, come before the state.
    """

    def losses_of(arm: TrainerStep) -> dict[str, float]:
        with arm.flags.applied():
            losses, _ = arm.trainer.train_step()
        return {name: value.item() for name, value in losses.items()}

    exact = precision == "fp32"
    for arm in (ours, reference):
        for _ in range(WARM_UP + 1 if arm.device.type == "cuda" else 0):
            losses_of(arm)
        state.load(arm.trainer)
    for k in range(STEPS):
        results = [losses_of(ours), losses_of(reference)]
        if not exact:
            results[0] = {name: value for name, value in results[0].items() if name not in DRAWN}
        tolerance = (1e-4 if k == 0 else 1e-2) if exact else TOLERANCES[precision] * (1 + k)
        _compare_losses(f"step {k}, {precision}", results[0], results[1], tolerance)
    if exact:
        found, expected = (State.of(arm.trainer.method, arm.trainer.ema.network) for arm in (ours, reference))
        _compare("network", found.network, expected.network, 1e-2)
        _compare("bank", {"centers": found.bank["centers"]}, {"centers": expected.bank["centers"]}, 1e-2)


def _on_cpu(problem: Problem) -> Problem:
    return dataclasses.replace(problem, device=torch.device("cpu"))


def _on_host(tensors: Named) -> Named:
    return {name: value.detach().cpu() for name, value in tensors.items()}


def _host(module: torch.nn.Module) -> Named:
    return _on_host(module.state_dict())
