"""Cases of the losses: value and gradients of every backend against the reference in float64."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bacon_fast import functional
from tests.fuzz.draws import DIMS, SIZES, Draws
from tests.fuzz.judge import Wrong, check_gradient, check_value

Loss = Callable[..., Tensor]


def judge_loss(
    loss: Loss,
    vectors: dict[str, Tensor],
    others: dict[str, object],
    trained: Sequence[str],
    backends: Sequence[str],
    *,
    sharpness: float,
    broken: bool = False,
    eps: float = 1e-12,
    floor: float = 0.0,
) -> int:
    """Runs the loss with every backend; ``sharpness`` is the largest factor of a cosine. Returns the number of calls.

    ``broken``: an argument that matters is not finite. ``eps``: the smallest norm that vectors are divided by.
    ``floor``: gradients of this size count as 0.
    """

    def run(backend: str, double: bool) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = {name: value.double() if double else value for name, value in vectors.items()}
        for name in trained:
            leaves[name] = leaves[name].detach().requires_grad_()
        rest = {
            name: value.double() if double and isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in others.items()
        }
        found = loss(**leaves, **rest, backend=backend)
        if not found.requires_grad:
            raise Wrong(f"{backend}: no gradient")
        gradients = torch.autograd.grad(found.sum(), [leaves[name] for name in trained], materialize_grads=True)
        return found.detach(), dict(zip(trained, gradients))

    exact, exact_gradients = run("reference", True)
    if exact.numel() and bool(exact.isfinite().all()) == broken:
        raise Wrong(f"reference in float64: {exact} where input is {'not ' if broken else ''}finite")
    for backend in backends:
        found, gradients = run(backend, False)
        dtype = next(iter(vectors.values())).dtype
        unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        check_value(f"{backend} loss", found, exact, 30 * unit * (1 + sharpness))
        for name, gradient in gradients.items():
            half = torch.finfo(gradient.dtype).eps if gradient.dtype.itemsize == 2 else 0
            if exact.isfinite().all():
                tolerance = half + 300 * unit * (1 + sharpness)
                # The part of a gradient along its vector is taken out: it may be all of it.
                norm = torch.linalg.vector_norm(vectors[name].double(), dim=-1, keepdim=True).clamp_min(eps)
                slack = 30 * unit * sharpness / norm + floor
                check_gradient(f"{backend} gradient of {name}", gradient, exact_gradients[name], tolerance, slack)
    return 1 + len(backends)


def _temperature(draw: Draws) -> float:
    return draw.choice((0.02, 0.07, 0.1, 0.5, 1.0, 5.0))


def sup_con_loss(draw: Draws, backends: Sequence[str]) -> int:
    rows, dim, dtype = draw.choice(SIZES), draw.choice(DIMS), draw.dtype()
    vectors = {"features": draw.vectors(rows, dim, dtype=dtype)}
    last = draw.choice((0, 3, 2**31 - 1))
    others: dict[str, object] = {"labels": draw.strided(draw.integers(0, last, rows))}
    if draw.chance(0.3):
        vectors["prototypes"] = draw.vectors(draw.integer(1, 4), dim, dtype=dtype)
        others["prototype_weight"] = draw.choice((0.0, 0.5, 1.0))
    if draw.chance(0.4):
        others["weights"] = draw.uniform(rows) * draw.choice((0.0, 1.0, 7.0))
    temperature = _temperature(draw)
    others |= {"temperature": temperature, "reduction": draw.choice(("wmean", "pml", "none"))}
    # Where rounding decides whether a loss that is 0 counts as above 0, "pml" has two right answers.
    if others["reduction"] == "pml" and dim == 1:
        others["reduction"] = "wmean"
    broken = False
    if rows and draw.chance(0.25):
        broken = True
        if "weights" in others and draw.chance(0.3):
            others["weights"] = others["weights"].clone()
            others["weights"][draw.integer(0, rows - 1)] = draw.choice((math.nan, math.inf))
        elif "weights" not in others and others.get("prototype_weight") != 0:
            vectors["features"] = draw.break_one(vectors["features"])
        else:
            broken = False
    vectors = {name: draw.strided(value) for name, value in vectors.items()}
    return judge_loss(
        functional.sup_con_loss, vectors, others, list(vectors), backends, sharpness=1 / temperature, broken=broken
    )


def info_nce(draw: Draws, backends: Sequence[str]) -> int:
    rows, dim, dtype = draw.choice(SIZES), draw.choice(DIMS), draw.dtype()
    vectors = {"queries": draw.vectors(rows, dim, dtype=dtype), "positives": draw.vectors(rows, dim, dtype=dtype)}
    if draw.chance(0.6):
        vectors["negatives"] = draw.vectors(draw.choice(SIZES), dim, dtype=dtype)
    broken = rows > 0 and draw.chance(0.25)
    if broken:
        name = draw.choice([name for name, value in vectors.items() if value.numel()])
        vectors[name] = draw.break_one(vectors[name])
    temperature = _temperature(draw)
    others = {"temperature": temperature, "reduction": draw.choice(("mean", "none"))}
    trained = ["queries", *(name for name in vectors if name != "queries" and draw.chance(0.5))]
    vectors = {name: draw.strided(value) for name, value in vectors.items()}
    return judge_loss(functional.info_nce, vectors, others, trained, backends, sharpness=1 / temperature, broken=broken)


def sscl_loss(draw: Draws, backends: Sequence[str]) -> int:
    rows, dim, keys, dtype = draw.choice(SIZES), draw.choice(DIMS), draw.integer(1, 3), draw.dtype()
    vectors = {
        "queries": draw.vectors(rows, dim, dtype=dtype),
        "keys": draw.vectors(rows, keys, dim, dtype=dtype),
        "queue": draw.vectors(draw.choice(SIZES), dim, dtype=dtype),
    }
    gamma = draw.choice((0.5, 5.0, 40.0))
    others: dict[str, object] = {
        "gamma": gamma,
        "margin": draw.choice((-0.25, 0.0, 0.4)),
        "form": draw.choice(("prod", "sum")),
        "reduction": draw.choice(("mean", "none")),
    }
    if draw.chance(0.5):
        others["alpha"] = draw.uniform(rows, keys)
    if draw.chance(0.4):
        others["key_mask"] = draw.mask(rows, keys)
    if draw.chance(0.4):
        last = draw.choice((0, 3, 2**31 - 1))
        others["query_classes"] = draw.integers(0, last, rows)
        others["queue_classes"] = draw.integers(-1, last, len(vectors["queue"]))
    broken = rows > 0 and draw.chance(0.25)
    if broken:
        vectors["queries"] = draw.break_one(vectors["queries"])
    vectors = {name: draw.strided(value) for name, value in vectors.items()}
    return judge_loss(functional.sscl_loss, vectors, others, ["queries"], backends, sharpness=gamma, broken=broken)


def bacon_loss(draw: Draws, backends: Sequence[str]) -> int:
    rows, dim, classes, dtype = draw.choice(SIZES), draw.choice(DIMS), draw.choice((1, 2, 3, 10)), draw.dtype()
    batch = draw.integer(0, rows)
    vectors = {
        "features": draw.vectors(rows, dim, dtype=dtype),
        "centers": draw.vectors(classes, dim, dtype=torch.promote_types(dtype, torch.float32)),
    }
    temperature = _temperature(draw)
    others: dict[str, object] = {
        "labels": draw.strided(draw.integers(0, classes - 1, batch)),
        # All different: which of equal logits is taken first differs from dtype to dtype.
        "logits": draw.normal(rows - batch, classes) * draw.choice((1e-3, 1.0, 30.0)),
        "reliable": draw.mask(rows),
        "class_counts": draw.integers(0, draw.choice((0, 5, 2**40)), classes),
        "progress": draw.choice((0, 0.3, 1.0, torch.tensor(0.5, dtype=torch.float64))),
        "temperature": temperature,
        "bta": draw.choice((0.0, 0.005, 0.9)),
        "negative_weight": draw.choice((None, 1.0, 64.0)),
        "top_k": draw.integer(1, 5),
        "neg_mode": draw.choice(("authors", "paper")),
    }
    if dtype == torch.float64:  # temperatures of integer counts are float32
        others["class_counts"] = others["class_counts"].double()
    if draw.chance(0.4):
        others["has_center"] = draw.mask(classes)
    vectors = {name: draw.strided(value) for name, value in vectors.items()}
    sharpness = 1 / (temperature * (1 - others["bta"]))
    return judge_loss(functional.bacon_loss, vectors, others, ["features"], backends, sharpness=sharpness, eps=1e-8)


def fixmatch_abc_loss(draw: Draws, backends: Sequence[str]) -> int:
    batch, unlabeled, classes, dtype = draw.choice(SIZES), draw.choice(SIZES), draw.choice((1, 2, 10)), draw.dtype()
    rows, scale = batch + 2 * unlabeled, draw.choice((1e-3, 1.0, 10.0, 1e4, 1e35))
    scale = min(scale, 1e4) if dtype == torch.float16 else scale
    vectors = {name: (draw.normal(rows, classes, dtype=dtype) * scale).to(dtype) for name in ("logits", "balanced")}
    others = {
        "labels": draw.integers(0, classes - 1, batch),
        "true_labels": draw.integers(-1, classes - 1, unlabeled),
        "keep_labeled": draw.uniform(classes),
        "keep_unlabeled": draw.mask(classes).float(),
        "step": draw.choice((0, 7, 2**32 - 1)),
        "seed": draw.choice((0, 1, 2**64 - 1)),
        "threshold": draw.choice((0.0, 0.95, 2.0)),
    }
    broken = batch > 0 and draw.chance(0.2)
    if broken:
        of_labeled = draw.integer(0, batch - 1)
        vectors["logits"][of_labeled, draw.integer(0, classes - 1)] = draw.choice((math.nan, math.inf))

    def total(**arguments) -> Tensor:
        out = functional.fixmatch_abc_loss(**arguments)
        return torch.stack([out.supervised, out.unsupervised, out.abc_labeled, out.abc_unlabeled])

    if others["threshold"] == 0.95:
        others["threshold"] = 0.95 + 1e-4  # no row of few classes has just this confidence
    vectors = {name: draw.strided(value) for name, value in vectors.items()}
    # The native softmax has no probabilities below exp(-87).
    options = {"sharpness": min(scale, 1e4), "broken": broken, "floor": 1e-37}
    return judge_loss(total, vectors, others, ["logits", "balanced"], backends, **options)
