"""BaConLoss under torch.compile: the backward must see the centers that the forward saw, not the ones written after."""

import pytest
import torch

from bacon_fast.losses.bacon import BaConLoss


def batch(step: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(24, 16, generator=generator).requires_grad_(),
        torch.randint(0, 5, (8,), generator=generator),
        3 * torch.randn(24, 5, generator=generator),
        torch.randint(0, 20, (8,), generator=generator),
        torch.randint(0, 40, (16,), generator=generator),
    )


@pytest.mark.slow
def test_compiled_gradients_and_state_equal_eager_ones_over_steps():
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = BaConLoss(16, 5, 20, 40, reliable_threshold=0.3, count_threshold=0.3)
        call = torch.compile(module, fullgraph=True) if compiled else module
        records = []
        for step in range(4):
            features, *rest = batch(step)
            out = call(features, *rest, progress=torch.tensor(0.5), active=True)
            out.loss.backward()
            records.append((out.loss.detach(), features.grad, module.projection.weight.grad.clone()))
        runs.append((records, module.state_dict()))
    assert runs[0][0][1][1].any(), "the loss must be at work from the second step on"
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-6)
