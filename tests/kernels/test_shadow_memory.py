"""Every kernel under shadow memory, and that shadow memory sees what it is there to see."""

import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from bacon_step_cases import SHAPES, assert_same_state, batch, module, take
from contrastive_cases import CASES, loss_and_gradients, problem, upstream
from shadow_memory import ShadowMemory

from bacon_fast import functional
from bacon_fast.kernels.bacon_step_design import DESIGNS, use_design
from bacon_fast.ops.checks import trusted_values
from bacon_fast.ops.contrastive import contrastive

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
from test_fixmatch_abc_gpu import random_batch
from test_fixmatch_abc_gpu import run as run_fixmatch_abc

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


@triton.jit
def sum_kernel(x, total, size, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + index, mask=index < size, other=0), axis=0)
    if ATOMIC:
        tl.atomic_add(total, part, sem="relaxed")
    else:
        tl.store(total, tl.load(total) + part)


@triton.jit
def turn_kernel(x, size, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    value = tl.load(x + (index + 1) % size, mask=index < size)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + index, value, mask=index < size)


@triton.jit
def copy_kernel(x, out, size, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index, tl.load(x + index, mask=index < size), mask=index < size)


@triton.jit
def fold_kernel(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out + index // 2, tl.load(x + index))


@triton.jit
def ticket_kernel(x, ticket, total, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    """The program that comes last adds up what each has left; or none waits."""
    own = tl.program_id(0)
    tl.store(x + own, own)
    last = own == 0
    if WAITS:
        tl.debug_barrier()
        last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        index = tl.arange(0, BLOCK)
        tl.store(total, tl.sum(tl.load(x + index, mask=index < tl.num_programs(0), other=0), axis=0))


def findings(shadow: ShadowMemory) -> str:
    """What was found, which then counts as expected."""
    found = "\n".join(shadow.findings)
    shadow.findings.clear()
    return found


def test_a_planted_race_is_reported(shadow):
    x, total = torch.arange(40), torch.zeros((), dtype=torch.int64)
    sum_kernel[(5,)](x, total, 40, ATOMIC=True, BLOCK=8)
    assert total == 780 and not shadow.findings
    sum_kernel[(5,)](x, total, 40, ATOMIC=False, BLOCK=8)
    assert "sum_kernel: race between sum_kernel:" in findings(shadow)


def test_a_planted_access_out_of_bounds_is_reported(shadow):
    x, out = torch.arange(100), torch.zeros(100, dtype=torch.int64)
    copy_kernel[(1,)](x[:20], out, 20, BLOCK=32)
    assert not shadow.findings
    copy_kernel[(1,)](x[:20], out, 21, BLOCK=32)  # lies within the storage, but not within the tensor
    assert "copy_kernel: out of bounds at copy_kernel:" in findings(shadow)
    copy_kernel[(1,)](x, out[30:50], 21, BLOCK=32)
    assert "copy_kernel: out of bounds at copy_kernel:" in findings(shadow)


def test_a_missing_barrier_is_reported(shadow):
    turn_kernel[(1,)](torch.arange(20), 20, BARRIER=True, BLOCK=32)
    assert not shadow.findings
    turn_kernel[(1,)](torch.arange(20), 20, BARRIER=False, BLOCK=32)
    assert "turn_kernel: no barrier between turn_kernel:" in findings(shadow)


def test_elements_stored_to_one_address_are_reported(shadow):
    fold_kernel[(1,)](torch.arange(8), torch.zeros(4, dtype=torch.int64), BLOCK=8)
    assert "fold_kernel: several elements stored to one address" in findings(shadow)


def test_the_last_ticket_comes_after_all_programs(shadow):
    x, ticket, total = (torch.zeros(6, dtype=torch.int64) for _ in range(3))
    ticket_kernel[(6,)](x, ticket[0], total[0], BLOCK=8, WAITS=True)
    assert total[0] == 15 and not shadow.findings
    ticket_kernel[(6,)](x, ticket[0], total[0], BLOCK=8, WAITS=False)
    assert "ticket_kernel: race between ticket_kernel:" in findings(shadow)


def test_programs_run_in_another_order_and_allocations_are_poisoned(shadow):
    x, ticket, total = (torch.zeros(32, dtype=torch.int64) for _ in range(3))
    ticket_kernel[(32,)](x, ticket[0], total[0], BLOCK=32, WAITS=True)
    assert shadow._order != sorted(shadow._order) and shadow.programs["ticket_kernel"] == 32
    assert x.new_empty(3, dtype=torch.float32).isnan().all() and (x.new_empty(3) > 10**4).all()
    assert torch.empty_like(x, dtype=torch.float16).isnan().all()


STEPS = [
    ("odd", "fixed", "authors"),
    ("odd", "official", "paper"),
    ("several-blocks", "fixed", "authors"),
    ("many-classes", "blog", "paper"),
    ("one-class", "official", "authors"),
    ("labeled-only", "fixed", "authors"),
    ("unlabeled-only", "official", "authors"),
    ("one-row", "blog", "paper"),
]


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name, variant, neg_mode", STEPS)
def test_bacon_step(shadow, design, name, variant, neg_mode):
    """Two runs, whose programs come in different orders, agree bit for bit."""
    modules = [module(SHAPES[name], "triton", variant=variant, neg_mode=neg_mode) for _ in range(2)]
    with use_design(design):
        for seed in range(2):
            (loss, gradient, _), (again, gradient_again, _) = (take(m, batch(SHAPES[name], seed)) for m in modules)
            assert torch.equal(loss, again) and torch.equal(gradient, gradient_again)
            assert loss.isfinite() and gradient.isfinite().all()
            assert_same_state(*modules)
    if name == "several-blocks":
        assert min(shadow.programs.values()) > 1


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", ["labels", "unlabeled_slots"])
def test_an_invalid_label_or_slot_touches_nothing_else(shadow, design, name):
    step = batch(SHAPES["odd"], 0)
    step[name][0] = 10**9
    with use_design(design), trusted_values():  # a GPU has no check before the kernels
        assert take(module(SHAPES["odd"], "triton"), step)[0].isnan()


@pytest.mark.parametrize("design", DESIGNS)
def test_the_steps_barriers_are_needed(design):
    with ShadowMemory(barriers=False).watch() as memory, use_design(design):
        take(module(SHAPES["odd"], "triton"), batch(SHAPES["odd"], 0))
    assert any("no barrier" in found for found in memory.findings)


FAMILY = [(case, "mean") for case in CASES] + [
    (case, "prod") for case in CASES if case.name in ("odd", "queue", "long")
]


@pytest.mark.parametrize("case, form", FAMILY, ids=str)
def test_contrastive(shadow, case, form):
    arguments, options = problem(case, torch.float32)
    options["form"] = form
    results = [
        loss_and_gradients(contrastive, case, arguments, upstream(case, torch.float32), backend="triton", **options)
        for _ in range(2)
    ]
    (loss, gradients), (again, gradients_again) = results
    assert torch.equal(loss, again) and loss.isfinite().all()
    for one, two in zip(gradients, gradients_again, strict=True):
        assert torch.equal(one, two) and one.isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("bacon", "queue", "odd")], ids=str)
def test_contrastive_in_chunks(shadow, case):
    arguments, options = problem(case, torch.float32)
    grad = upstream(case, torch.float32)
    loss, gradients = loss_and_gradients(contrastive, case, arguments, grad, backend="chunks", form="sum", **options)
    assert loss.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    assert {"_statistics_kernel", "_weights_kernel"} <= set(
        shadow.launches
    ) and "_gradient_kernel" not in shadow.launches


@pytest.mark.parametrize("sizes", [(1, 1, 1), (0, 9, 7), (9, 0, 7), (33, 65, 20)], ids=str)
def test_fixmatch_abc(shadow, sizes):
    inputs = random_batch(*sizes, torch.float32)
    results = [run_fixmatch_abc(inputs, backend="triton", step=5, seed=7) for _ in range(2)]
    for one, two in zip(itertools.chain(*results[0]), itertools.chain(*results[1]), strict=True):
        assert torch.equal(one, two) and one.double().isfinite().all()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 5, 3, 4), (3, 7, 9, 10), (5, 50, 7, 8)], ids=str)
def test_batch_norm(shadow, shape, residual):
    def run() -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)

        def images() -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(memory_format=torch.channels_last).requires_grad_()

        leaves = [images(), *(torch.randn(shape[1], generator=generator).requires_grad_() for _ in range(2))]
        leaves += [images()] if residual else []
        buffers = [torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(3)]
        activated, total = functional.batch_norm_act(
            *leaves[:3], *buffers, residual=leaves[3] if residual else None,
            momentum=0.1, eps=1e-5, negative_slope=0.1, backend="triton",
        )  # fmt: skip
        gradients = torch.autograd.grad((activated, total), leaves, (torch.ones_like(activated),) * 2)
        return [activated.detach(), total.detach(), *gradients, *buffers]

    for one, two in zip(run(), run(), strict=True):
        assert torch.equal(one, two) and one.double().isfinite().all()
