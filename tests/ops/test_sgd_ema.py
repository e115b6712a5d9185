"""The fused step of Nesterov SGD and the moving average against torch.optim.SGD and torch.lerp in float64."""

import pytest
import torch
from torch import Tensor

from bacon_fast.functional import sgd_ema_

RATE, MOMENTUM, AVERAGE = 0.0625, 0.9, 0.75  # the rate is exact in float32
# Scalars, vectors, sizes around one and around several pieces of work (4096 elements), and nothing.
SHAPES = [(), (1,), (3, 5), (4095,), (4096,), (4097,), (2, 3, 3, 3), (10000,), (0,), (64, 129)]
BACKENDS = ["cpp", "reference"]


class Problem:
    """Tensors of a step, and the same in float64 under torch's own optimizer."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32, seed=0, memory_format=None):
        generator = torch.Generator().manual_seed(seed)

        def draw(shape) -> Tensor:
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return tensor.to(memory_format=memory_format) if memory_format and tensor.dim() == 4 else tensor

        self.generator, self.draw = generator, draw
        self.parameters, self.averages = [draw(s) for s in shapes], [draw(s) for s in shapes]
        self.momenta = [torch.zeros_like(p) for p in self.parameters]
        self.decays = [0.05 * (i % 3) for i in range(len(shapes))]
        self.exact = [p.double().clone().requires_grad_() for p in self.parameters]
        self.exact_averages = [a.double().clone() for a in self.averages]
        groups = [{"params": [p], "weight_decay": d} for p, d in zip(self.exact, self.decays)]
        self.optimizer = torch.optim.SGD(groups, RATE, MOMENTUM, nesterov=True)

    def step(self, *, backend, missing=(), without=(), scale=None, overflow=False, gradients=None, **options) -> None:
        if gradients is None:
            gradients = [None if i in missing else self.draw(p.shape) for i, p in enumerate(self.parameters)]
        sgd_ema_(
            self.parameters,
            [None if g is None else g * (scale or 1) for g in gradients],
            [None if g is None else m for g, m in zip(gradients, self.momenta)],
            [None if i in without else a for i, a in enumerate(self.averages)],
            self.decays,
            rate=torch.tensor(RATE),
            momentum=MOMENTUM,
            average_momentum=AVERAGE,
            grad_scale=None if scale is None else torch.tensor(scale),
            found_inf=torch.tensor(float(overflow)) if scale is not None else None,
            backend=backend,
            **options,
        )
        for p, g in zip(self.exact, gradients):
            p.grad = None if g is None else g.double()
        if not overflow:
            self.optimizer.step()
        for i, (a, p) in enumerate(zip(self.exact_averages, self.exact)):
            if i not in without:
                a.lerp_(p.detach(), 1 - AVERAGE)

    def check(self, rtol=1e-5, atol=1e-5) -> None:
        for i, p in enumerate(self.parameters):
            momentum = self.optimizer.state[self.exact[i]].get("momentum_buffer")
            momentum = torch.zeros_like(self.exact[i]) if momentum is None else momentum
            for found, expected in (
                (p, self.exact[i]),
                (self.momenta[i], momentum),
                (self.averages[i], self.exact_averages[i]),
            ):
                torch.testing.assert_close(found.double(), expected.detach(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-14), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
)
def test_steps_equal_torch_in_float64(dtype, tolerance, backend):
    problem = Problem(dtype=dtype)
    addresses = [t.data_ptr() for t in problem.parameters + problem.momenta + problem.averages]
    for _ in range(3):
        problem.step(backend=backend)
    problem.check(rtol=tolerance, atol=tolerance)
    assert addresses == [t.data_ptr() for t in problem.parameters + problem.momenta + problem.averages]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_may_start_late_or_pause_or_have_no_average(backend):
    problem = Problem()
    problem.step(backend=backend, missing={2, 4, 7}, without={1, 4})
    problem.step(backend=backend, missing={2}, without={1, 4})
    problem.step(backend=backend, missing={0, 7}, without={1, 4})
    problem.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_changes_nothing_but_the_average(backend):
    problem = Problem()
    problem.step(backend=backend, scale=1024.0)
    before = [t.clone() for t in problem.parameters + problem.momenta]
    gradients = [torch.full_like(p, float("inf")) for p in problem.parameters]
    problem.step(backend=backend, scale=1024.0, overflow=True, gradients=gradients)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.parameters + problem.momenta))
    problem.step(backend=backend, scale=512.0)
    problem.check()


def test_more_tensors_than_one_launch_takes():
    problem = Problem([(i % 7 + 1, 3) for i in range(1100)])
    for _ in range(2):
        problem.step(backend="cpp", missing={0, 511, 512, 513, 1099})
    problem.check()


def test_dtypes_may_mix():
    problems = [Problem([(5000,), (3,)], dtype, seed) for seed, dtype in enumerate((torch.float32, torch.bfloat16))]
    gradients = [[p.draw(t.shape) for t in p.parameters] for p in problems]
    copies, copied = [torch.zeros(3, dtype=torch.int64)], [torch.arange(3)]
    sgd_ema_(
        [t for p in problems for t in p.parameters],
        [g for of_problem in gradients for g in of_problem],
        [t for p in problems for t in p.momenta],
        [t for p in problems for t in p.averages],
        [d for p in problems for d in p.decays],
        copies,
        copied,
        rate=torch.tensor(RATE),
        momentum=MOMENTUM,
        average_momentum=AVERAGE,
        backend="cpp",
    )
    assert torch.equal(copies[0], copied[0])
    for problem, of_problem in zip(problems, gradients):
        alone = Problem([(5000,), (3,)], problem.parameters[0].dtype, problems.index(problem))
        alone.step(backend="cpp", gradients=of_problem)
        for found, expected in zip(problem.parameters + problem.averages, alone.parameters + alone.averages):
            assert torch.equal(found, expected)


def test_memory_order_is_free_and_a_gradient_may_have_another():
    problem = Problem([(8, 5, 3, 3), (16, 4, 1, 1)], memory_format=torch.channels_last)
    assert not problem.parameters[0].is_contiguous()
    gradients = [torch.randn(p.shape, generator=problem.generator) for p in problem.parameters]
    assert gradients[0].stride() != problem.parameters[0].stride()
    problem.step(backend="cpp", gradients=gradients)
    problem.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_are_copied_whatever_they_hold(backend):
    copied = [
        torch.arange(7),
        torch.tensor(3),
        torch.rand(5000),
        torch.tensor([True, False, True]),
        torch.rand(3, 3, dtype=torch.float64),
        torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.zeros(0),
    ]
    copies = [torch.full_like(t, 1) for t in copied]
    addresses = [t.data_ptr() for t in copies]
    sgd_ema_([], [], [], [], [], copies, copied, rate=torch.tensor(RATE), backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(copies, copied))
    assert addresses == [t.data_ptr() for t in copies]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_an_average_of_weight_one_or_none_is_exact(backend, momentum):
    parameter, average = torch.tensor([1e8, 3.3, -7.1]), torch.tensor([0.1, 1e7, 5.5])
    expected = parameter.clone() if momentum == 0 else average.clone()
    options = {"average_momentum": momentum, "backend": backend}
    sgd_ema_([parameter], [None], [None], [average], [0.1], rate=torch.tensor(1.0), **options)
    assert torch.equal(average, expected)


def test_what_does_not_fit_is_named():
    p = torch.zeros(2, 3, 4, 4)
    last, rate = p.to(memory_format=torch.channels_last), torch.tensor(0.1)

    def call(parameters=(p,), gradients=(p,), momenta=(p,), averages=(p,), decays=(0.0,), rate=rate, **options):
        sgd_ema_(
            list(parameters),
            list(gradients),
            list(momenta),
            list(averages),
            list(decays),
            rate=rate,
            backend="cpp",
            **options,
        )

    call()
    for error, name, wrong in (
        (ValueError, "gradients", {"gradients": ()}),
        (ValueError, "weight_decays", {"decays": (0.0, 1.0)}),
        (ValueError, r"momenta\[0\]", {"momenta": (None,)}),
        (ValueError, r"momenta\[0\]", {"momenta": (last,)}),
        (ValueError, r"averages\[0\]", {"averages": (last,)}),
        (ValueError, r"averages\[0\]", {"averages": (p[:1],)}),
        (TypeError, r"gradients\[0\]", {"gradients": (p.double(),)}),
        (TypeError, "float32", {"parameters": (p.long(),), "gradients": (None,), "averages": (None,)}),
        (TypeError, "rate: expected a float32 tensor of one number, found float", {"rate": 0.1}),
        (TypeError, "grad_scale: expected a float32 tensor of one number, found float", {"grad_scale": 2.0}),
        (TypeError, "rate", {"rate": rate.double()}),
        (ValueError, "rate", {"rate": torch.zeros(2)}),
        (ValueError, "found_inf", {"found_inf": torch.zeros(2)}),
        (ValueError, "momentum", {"momentum": -1.0}),
        (ValueError, "average_momentum", {"average_momentum": 1.5}),
        (ValueError, "copied", {"copies": (p,)}),
        (ValueError, r"copied\[0\]", {"copies": (p,), "copied": (last,)}),
        (TypeError, r"copied\[0\]", {"copies": (p,), "copied": (p.long(),)}),
    ):
        with pytest.raises(error, match=name):
            call(**wrong)
    with pytest.raises(ValueError, match="dense"):
        call(parameters=(torch.zeros(1, 3).expand(4, 3),), gradients=(None,), averages=(None,))


def test_torch_knows_what_the_op_changes():
    problem = Problem([(3, 5), (4097,)])
    none = torch.zeros(0)
    lists = (problem.parameters, [problem.draw((3, 5)), none], [problem.momenta[0], none], problem.averages)
    arguments = (*lists, problem.decays, [torch.zeros(3)], [torch.ones(3)], torch.tensor(RATE), MOMENTUM, AVERAGE)
    torch.library.opcheck(torch.ops.bacon_fast.sgd_ema_.default, (*arguments, torch.tensor(2.0), torch.zeros(())))
