"""Training steps for `losses.BaConLoss`, on which its fused path must equal the composed one, buffer for buffer."""

import torch

from bacon_fast.losses.bacon import BaConLoss

# name -> (B, U, F, K, labeled slots, unlabeled slots); few slots, so that batches name them twice.
SHAPES = {
    "odd": (7, 14, 5, 7, 9, 13),
    "several-blocks": (11, 32, 19, 10, 12, 25),
    "many-classes": (6, 29, 33, 70, 9, 30),
    "two-classes": (5, 9, 8, 2, 6, 8),
    "one-class": (3, 6, 4, 1, 4, 5),
    "labeled-only": (9, 0, 6, 4, 5, 1),
    "unlabeled-only": (0, 11, 6, 4, 1, 9),
    "one-row": (1, 0, 1, 3, 2, 1),
}


def module(shape, backend, device="cpu", **options):
    _, _, dim, num_classes, labeled, unlabeled = shape
    options = {"reliable_threshold": 0.6, "count_threshold": 0.5} | options
    return BaConLoss(dim, num_classes, labeled, unlabeled, proj_layers=0, backend=backend, **options).to(device)


def batch(shape, seed, dtype=torch.float32, device="cpu"):
    batch_size, unlabeled, dim, num_classes, labeled_slots, unlabeled_slots = shape
    g = torch.Generator().manual_seed(seed)
    rows = batch_size + unlabeled
    # No two logits of a row are equal: torch.topk ranks those by no documented rule.
    logits = torch.rand(rows, num_classes, generator=g).argsort(1) + torch.rand(rows, 1, generator=g)
    logits = logits * torch.tensor([0.05, 1.0, 8.0])[torch.randint(3, (rows, 1), generator=g)]
    step = {
        "features": torch.randn(rows, dim, generator=g, dtype=torch.float64).to(dtype),
        "labels": torch.randint(num_classes, (batch_size,), generator=g),
        "logits": logits - logits.mean(1, keepdim=True),
        "labeled_slots": torch.randint(labeled_slots, (batch_size,), generator=g),
        "unlabeled_slots": torch.randint(unlabeled_slots, (unlabeled,), generator=g),
    }
    return {name: tensor.to(device) for name, tensor in step.items()}


def take(loss_module, step, progress=0.25, upstream=1.0):
    """Loss, gradient of the features and stats of one step."""
    features = step["features"].clone().requires_grad_()
    out = loss_module(**(step | {"features": features}), progress=progress, active=True)
    (upstream * out.loss).backward()
    return out.loss.detach(), features.grad, out.stats


def assert_same_state(found, expected, rounding=0.0):
    """Buffers equal bit for bit, or within ``rounding`` where two devices have normalized what the bank holds."""
    for name, buffer in expected.named_buffers():
        value = found.get_buffer(name).cpu()
        if rounding and name.endswith(("features", "centers", "class_sums")):
            # Of the sums, in fixed point, every slot may be off by that much.
            allowed = rounding * (2**30 * len(expected.bank.written) if name.endswith("class_sums") else 1)
            assert (value.double() - buffer.cpu().double()).abs().max() <= allowed, name
        else:
            assert torch.equal(value, buffer.cpu()), name
