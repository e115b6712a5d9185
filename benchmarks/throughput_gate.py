"""No speed without this: every arm's step equals ours, with the reference backend, in float32 without TF32.

A peers' arm gets the batches, the state and ABC's masks of the reference and has to give its losses over three steps,
and after them its parameters, averages, class centers and counts. Then the arm that will be timed, in its own precision
and with its own draws, has to give the losses without a draw on the first batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from throughput_loaders import HostBatch
from throughput_ours import TrainerStep
from throughput_peers import UsbStyleStep
from throughput_problem import MIDDLE, Named, Problem, State, random_batch
from throughput_step import Flags
from throughput_vectorized import NAMES, VectorizedStep
from torch import Tensor

from bacon_fast.engine.graph import WARM_UP
from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods.outputs import Batch
from bacon_fast.reference.heads import bernoulli

STEPS = 3
# Small, so that three steps do not magnify the rounding errors of the first one.
LEARNING_RATE = 1e-3
DRAWN = ("abc_labeled", "abc_unlabeled", "abc", "total")
TOLERANCES = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1, "fp16": 2e-2}


class RedGateError(RuntimeError):
    """An arm computes something else than we do."""


@dataclass(frozen=True)
class Truth:
    """What the reference does from a state on: batches in, losses [steps] and the state at the end out."""

    seed: int
    state: State
    batches: list[Batch]
    losses: list[dict[str, float]]
    end: State


def truth_of(trainer: Trainer, state: State) -> Truth:
    """The reference's steps. Raises RedGateError where the state would let a wrong arm pass."""
    state.load(trainer)
    phase = trainer.method.phase(MIDDLE)
    batches, losses = [random_batch(trainer, 1000 + k) for k in range(STEPS)], []
    with Flags().applied():
        for k, batch in enumerate(batches):
            output = trainer.method(batch, torch.tensor(MIDDLE + k, device=trainer.device), phase)
            trainer.optimizer.zero_grad()
            output.total.backward()
            for group in trainer.optimizer.param_groups:
                group["lr"] = LEARNING_RATE
            trainer.optimizer.step()
            trainer.ema.update(trainer.method.network)
            losses.append({name: value.item() for name, value in output.losses.items()})
            for name in ("pseudo_rate", "abc_rate", "reliable"):
                if not 0 < output.stats[name] < 1:
                    raise RedGateError(f"the state decides nothing: {name} is {output.stats[name].item()}")
    return Truth(trainer.config.seed, state, batches, losses, State.of(trainer))


def split(batch: Batch) -> HostBatch:
    """A batch of ours as the peers' arms take it."""
    labeled, weak, strong = batch.images.split([batch.num_labeled, batch.num_unlabeled, batch.num_unlabeled])
    return HostBatch(batch.labeled_slots, batch.labels, labeled, batch.unlabeled_slots, weak, strong)


def our_draws(seed: int, step: int) -> Callable[[Tensor, int], Tensor]:
    """ABC's masks as our method draws them at a step."""
    return lambda probability, stream: bernoulli(
        probability, seed, torch.tensor(step, device=probability.device), stream
    )


def _compare(what: str, found: Named, expected: Named, tolerance: float, floor: float = 1e-3) -> None:
    """Raises RedGateError unless every tensor is within ``tolerance`` of the largest element expected of it, or of
    ``floor`` where that is more."""
    for name, value in expected.items():
        value = value.double()
        error = (found[name].detach().cpu().double() - value).abs().max().item()
        allowed = tolerance * max(value.abs().max().item(), floor)
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
            _compare_losses(f"step {k}", found, truth.losses[k], 1e-4 if k == 0 else 1e-3)
    state = end()
    # Differences from the start, so that what is compared is the updates and not what they change. Of weights around 1
    # a small update holds the rounding of the weight.
    for part, floor in (("network", 1e-4), ("projection", 1e-4), ("averaged", 1e-6)):
        start, expected = getattr(truth.state, part), getattr(truth.end, part)
        _compare(f"update of {part}", _moved(start, getattr(state, part)), _moved(start, expected), 2e-2, floor)
    for name in ("centers", "class_counts", "selected_label", "written"):
        _compare("bank", {name: state.bank[name]}, {name: truth.end.bank[name]}, 1e-3)


def check_usb_style(problem: Problem, truth: Truth) -> None:
    """Arms A and B."""
    arm = UsbStyleStep(problem, truth.state, workers=None)
    _set_rate(arm.optimizer)

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
    arm = VectorizedStep(problem, truth.state, "fp32", batches=None)
    _set_rate(arm.optimizer)

    def update(batch: HostBatch, draw: Callable) -> dict[str, float]:
        arm.loss.draw = draw
        return dict(zip(NAMES, arm.update(batch).tolist()))

    def end() -> State:
        loss, buffers = arm.loss, _on_host(dict(arm.loss.named_buffers()))
        return State(_host(loss.network), _host(arm.averaged), _host(loss.projection), buffers)

    check_steps(truth, update, end)


def check_timed(losses: dict[str, float], truth: Truth, precision: str) -> None:
    """The first step of the arm that is to be timed, on the first batch."""
    found = {name: value for name, value in losses.items() if name not in DRAWN and name in truth.losses[0]}
    _compare_losses(f"in {precision}", found, truth.losses[0], TOLERANCES[precision])


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
        found, expected = State.of(ours.trainer), State.of(reference.trainer)
        _compare("network", found.network, expected.network, 1e-2)
        _compare("bank", {"centers": found.bank["centers"]}, {"centers": expected.bank["centers"]}, 1e-2)


def _set_rate(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE


def _on_host(tensors: Named) -> Named:
    return {name: value.detach().cpu() for name, value in tensors.items()}


def _host(module: torch.nn.Module) -> Named:
    return _on_host(module.state_dict())
