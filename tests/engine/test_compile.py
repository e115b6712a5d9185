"""Every method under torch.compile: one graph a phase, with the losses and gradients of the eager step."""

import pytest
import torch
from run_cases import tiny

from bacon_fast.engine.trainer import Trainer
from bacon_fast.methods import METHODS

# All parts of a method take part from the third or fourth step on; CReST's second generation lies behind the last.
PARTS = dict.fromkeys(("bacon.contrast_start", "daso.start", "darp.start", "cossl.start", "cdmad.start"), 0.1)
PARTS["crest.generations"] = 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_one_graph_with_the_gradients_of_the_eager_step(tmp_path, method):
    """Uses the compiler's own split into forward and backward. The backward recomputes, so the step must not have
    overwritten what it reads again."""
    torch._dynamo.reset()
    eager, compiled = (Trainer(tiny(tmp_path / name, method=method, steps=20, parts=PARTS)) for name in ("a", "b"))
    options = {"backend": "aot_eager_decomp_partition", "fullgraph": True}
    compiled.program.forward = torch.compile(compiled.method, **options)
    for _ in range(5):
        # Each step from the same state: rounding would part two runs before long.
        compiled.method.load_state_dict(eager.method.state_dict())
        compiled.ema.load_state_dict(eager.ema.state_dict())
        losses, found = (trainer.train_step()[0] for trainer in (eager, compiled))
        assert losses.keys() == found.keys()
        for name, value in losses.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=f"{name}: {found[name]} {value}")
        for (name, p), q in zip(eager.method.named_parameters(), compiled.method.parameters()):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and "stem.bias" not in name:  # BatchNorm subtracts it: its gradient is rounding
                assert (q.grad - p.grad).norm() <= 2e-2 * p.grad.norm() + 1e-4, name
        for (name, p), q in zip(eager.method.named_buffers(), compiled.method.buffers()):
            torch.testing.assert_close(q, p, rtol=1e-2, atol=1e-3, msg=name)
    for trainer in (eager, compiled):
        trainer.logger.close()
