"""Every public function and class has an example in its docstring, and the examples run."""

import doctest
import inspect
import sys

import pytest
import torch

from bacon_fast import functional, losses

RESULTS = (functional.FixMatchABCOutput, losses.BaConOutput)  # returned, not called
CALLED = [
    value for room in (functional, losses) for name in room.__all__ if (value := getattr(room, name)) not in RESULTS
]


@pytest.mark.parametrize("called", CALLED, ids=lambda called: called.__name__)
def test_the_example_runs(called):
    torch.manual_seed(0)
    finder = doctest.DocTestFinder(recurse=inspect.isclass(called))
    tests = finder.find(called, called.__name__, globs=dict(vars(sys.modules[called.__module__])))
    results = [doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert not sum(result.failed for result in results)


def test_a_wrong_example_would_be_seen():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
