"""Cases of what is no loss: the memory bank, centers, temperatures, the optimizer's step, batch normalization."""

import math
from collections.abc import Sequence

import torch

from bacon_fast import functional
from bacon_fast.losses import MemoryBank
from tests.fuzz.draws import Draws
from tests.fuzz.judge import Wrong, check_equal, check_gradient, check_value


def memory_bank(draw: Draws, backends: Sequence[str]) -> int:
    """bank_select_ and bank_write_, some steps long: all backends bit for bit, and the centers those of fsum."""
    slots, classes, dim = draw.integer(1, 12), draw.integer(1, 4), draw.integer(1, 5)
    banks = {name: MemoryBank(slots, classes, dim, backend=name) for name in ("reference", *backends)}
    calls = 0
    for _ in range(4):
        rows = draw.choice((0, 1, 3, 9))
        named = draw.strided(draw.integers(0, slots - 1, rows))
        labels, gates = draw.integers(0, classes - 1, rows), (draw.mask(rows), draw.mask(rows))
        features = draw.vectors(rows, dim, dtype=torch.float32)
        if rows and draw.chance(0.3):
            features = draw.break_one(features)
        for bank in banks.values():
            bank.select_(named, labels, gates[0])
            bank.write_(named, draw.strided(features), gates[1])
            calls += 2
    first = banks["reference"]
    for name, bank in banks.items():
        for key, buffer in bank.named_buffers():
            check_equal(f"{name}, {key}", buffer, first.get_buffer(key))
    for c in range(classes):
        chosen = first.features[first.written & (first.selected_label == c)].double()
        for d in range(dim if len(chosen) else 0):
            # Features lie on a grid of 2^-30.
            check_value("center", first.centers[c, d], _mean(chosen[:, d]).float(), 1e-6)
    return calls


def _mean(values: torch.Tensor) -> torch.Tensor:
    return torch.tensor(math.fsum(values.tolist()) / len(values), dtype=torch.float64)


def class_centers(draw: Draws, backends: Sequence[str]) -> int:
    slots, classes, dim = draw.choice((0, 1, 7, 40)), draw.integer(1, 4), draw.integer(1, 5)
    bank = draw.vectors(slots, dim, dtype=draw.dtype())
    if slots and draw.chance(0.3):
        bank = draw.break_one(bank)
    labels, written = draw.integers(-1, classes - 1, slots), draw.mask(slots)
    centers, has_center = functional.class_centers(draw.strided(bank), draw.strided(labels), classes, written)
    for c in range(classes):
        chosen = bank[written & (labels == c)].double()
        if bool(len(chosen)) != bool(has_center[c]):
            raise Wrong(f"has_center of class {c}: {has_center[c]} for {len(chosen)} slots")
        for d in range(dim):
            expected = torch.zeros(())
            if len(chosen):
                expected = (
                    _mean(chosen[:, d].clamp(-4096, 4096)) if chosen.isfinite().all() else torch.tensor(torch.nan)
                )
            check_value("center", centers[c, d], expected, 1e-6)
    return 1


def balanced_temperatures(draw: Draws, backends: Sequence[str]) -> int:
    counts = draw.integers(0, draw.choice((0, 3, 2**53)), draw.integer(1, 20))
    counts = counts if draw.chance(0.5) else counts.float()
    progress, tau, bta = draw.choice((0.0, 0.25, 1.0)), draw.choice((0.02, 0.1, 5.0)), draw.choice((0.0, 0.005, 0.99))
    least = draw.choice((0.0, 0.05))
    given = torch.tensor(progress) if draw.chance(0.5) else progress
    found = functional.balanced_temperatures(counts, progress=given, temperature=tau, bta=bta, min_temperature=least)
    top = max(counts.max().item(), 1)
    exact = [max(tau * (1 - bta * (1 - progress) ** 2 * math.sqrt(n / top)), least) for n in counts.tolist()]
    check_value("temperatures", found, torch.tensor(exact, dtype=torch.float64), 1e-5 * tau)
    return 1


def sgd_ema(draw: Draws, backends: Sequence[str]) -> int:
    shapes = [draw.choice(((), (1,), (0,), (3, 5), (2, 3, 1, 4), (4099,))) for _ in range(draw.integer(1, 4))]
    dtype, moving = draw.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16)), draw.chance(0.7)
    start = [
        [draw.normal(*shape, dtype=dtype) * draw.choice((0.0, 1e-3, 1.0, 100.0)) for shape in shapes] for _ in range(4)
    ]
    trained = [draw.chance(0.8) for _ in shapes]
    decays = [draw.choice((0.0, 5e-4, 0.1)) for _ in shapes]
    options = {"momentum": draw.choice((0.0, 0.9, 0.999)), "average_momentum": draw.choice((0.0, 0.999, 1.0))}
    scalars = {"rate": draw.choice((0.0, 0.03, 10.0))}
    if draw.chance(0.4):
        scalars |= {"grad_scale": draw.choice((1.0, 1024.0)), "found_inf": draw.choice((0.0, 0.0, 1.0))}
    scalars = {name: torch.tensor(value) for name, value in scalars.items()}
    if scalars.get("found_inf", 0) and start[1][0].numel():
        start[1][0].view(-1)[0] = math.nan  # the overflow that the flag speaks of

    def run(backend: str, double: bool) -> list[list[torch.Tensor]]:
        parameters, gradients, momenta, averages = (
            [tensor.to(torch.float64 if double else dtype, copy=True) for tensor in tensors] for tensors in start
        )
        functional.sgd_ema_(
            parameters,
            [g if used else None for g, used in zip(gradients, trained)],
            [m if used else None for m, used in zip(momenta, trained)],
            averages if moving else [None] * len(shapes),
            decays,
            **scalars,
            **options,
            backend=backend,
        )
        return [parameters, momenta, averages]

    exact = run("reference", True)
    for backend in backends:
        for kind, found, truth in zip(("parameter", "momentum", "average"), run(backend, False), exact):
            for a, b in zip(found, truth):
                # Beside what was added up: a sum may cancel.
                size = 1 + (
                    max(t.abs().nan_to_num(0).max().item() for t in start_of(start, a.shape)) if a.numel() else 0
                )
                check_value(f"{backend} {kind}", a / (50 * size), b / (50 * size), 8 * torch.finfo(dtype).eps)
    return 1 + len(backends)


def start_of(start: list[list[torch.Tensor]], shape: torch.Size) -> list[torch.Tensor]:
    """All tensors of a shape."""
    return [tensor for tensors in start for tensor in tensors if tensor.shape == shape]


def batch_norm_act(draw: Draws, backends: Sequence[str]) -> int:
    size, dtype = (draw.integer(1, 4), draw.choice((1, 3, 16)), draw.integer(1, 5), draw.integer(2, 5)), draw.dtype()
    channels, shift = size[1], draw.choice((0.0, 0.0, 3.0))
    x = (draw.normal(*size, dtype=torch.float64) * draw.choice((1e-2, 1.0, 50.0)) + shift).to(dtype)
    residual = draw.normal(*size, dtype=dtype) if draw.chance(0.5) else None
    weight, bias = draw.normal(channels), draw.normal(channels)
    mean, variance = draw.normal(channels), draw.uniform(channels) + 0.5
    tracked = draw.chance(0.7)
    training = draw.chance(0.8) or not tracked
    last = torch.channels_last if draw.chance(0.7) else torch.contiguous_format
    options = {"training": training, "negative_slope": draw.choice((0.0, 0.1, 1.0)), "momentum": 0.3}
    broken = draw.chance(0.2)
    if broken:
        x = draw.break_one(x)

    def run(backend: str, double: bool) -> list[torch.Tensor]:
        wide = torch.float64 if double else torch.promote_types(dtype, torch.float32)
        leaves = [x.to(wide if double else dtype, copy=True), *(v.to(wide, copy=True) for v in (weight, bias))]
        leaves[0] = leaves[0].contiguous(memory_format=last)
        other = None if residual is None else residual.to(leaves[0].dtype).contiguous(memory_format=last)
        state = [mean.to(wide, copy=True), variance.to(wide, copy=True)] if tracked else [None, None]
        for leaf in leaves:
            leaf.requires_grad_()
        activated, total = functional.batch_norm_act(*leaves, *state, residual=other, **options, backend=backend)
        gradients = torch.autograd.grad((activated * activated.detach()).sum() + total.sum(), leaves)
        return [activated.detach(), total.detach(), *(s for s in state if s is not None), *gradients]

    exact = run("reference", True)
    if bool(exact[0].isfinite().all()) == broken:
        raise Wrong(f"reference in float64 is {'not ' if not broken else ''}finite")
    for backend in backends:
        found = run(backend, False)
        unit = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-5
        if broken:
            if found[0].isfinite().all():
                raise Wrong(f"{backend}: finite where x is not")
            continue
        # Cancellation in x - mean; the sum of a half-precision residual is rounded before.
        tolerance = 30 * unit * (1 + 100 * shift)
        of_values, of_gradients = (list(zip(found, exact))[part] for part in (slice(-3), slice(-3, None)))
        for name, (a, b) in zip(("activated", "sum", "mean", "variance"), of_values):
            check_value(f"{backend} {name}", a, b, tolerance)
        for name, (a, b) in zip(("x", "weight", "bias"), of_gradients):
            check_gradient(f"{backend} gradient of {name}", a.flatten(), b.flatten(), 10 * tolerance)
    return 1 + len(backends)
