"""Methods as a run builds them, on a network of one convolution, and the passes of that network as formulas."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bacon_fast import methods
from bacon_fast.methods.method import Method
from bacon_fast.methods.options import SharedOptions
from bacon_fast.methods.outputs import Batch
from bacon_fast.methods.part import DataInfo, Setup
from bacon_fast.models.batchnorm import BatchNorm2d
from bacon_fast.models.spec import NetworkSpec, build_network

K, FEATURES, SIDE, STEPS, SEED = 3, 4, 6, 8, 11
COUNTS, N_ULB = torch.tensor([6, 3, 1]), 50
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.5)


class Convolution(nn.Module):
    num_features = FEATURES

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, FEATURES, 3, padding=1, bias=False)
        self.bn = BatchNorm2d(FEATURES, momentum=momentum)

    def forward(self, images: Tensor) -> Tensor:
        return F.leaky_relu(self.bn(self.conv(images)), 0.1).mean((2, 3))


def build(
    method: str,
    rows: tuple[int, int],
    *,
    shared: Mapping[str, object],
    backbone: nn.Module | None = None,
    head: nn.Module | None = None,
    momentum: float = 0.1,
    **parts: Mapping[str, object],
) -> Method:
    """The method in float64 with these options of its parts, bound to an average that is its network's first state.

    rows: B and U. momentum: of BatchNorm.
    """
    options = {n: replace(part, **parts.get(n, {})) for n, part in methods.default_options(method).items()}
    torch.manual_seed(0)
    asked = {name: value for part in options.values() for name, value in part.network().items()}
    network = build_network(NetworkSpec("wrn-10-1", K, **asked))
    network.backbone = backbone or Convolution(momentum)
    network.head = head or nn.Linear(network.backbone.num_features, K)
    if head is None:
        nn.init.normal_(network.head.weight, std=3)
    data = DataInfo(K, COUNTS, int(COUNTS.sum()), N_ULB, MEAN, STD, same_imbalance=False)
    setup = Setup(
        data,
        network.backbone.num_features,
        steps=STEPS,
        seed=SEED,
        labeled_rows=rows[0],
        unlabeled_rows=rows[1],
        ema=0.9,
        shared=SharedOptions(**shared),
        parts=options,
    )
    made = methods.build_method(options, setup, network).double()
    made.bind(copy.deepcopy(made.network).eval())
    return made


def make_batch(method: Method, rows: tuple[int, int], seed: int) -> Batch:
    """Random images of all views that the method asks for."""
    generator = torch.Generator().manual_seed(seed)
    labeled, unlabeled = rows

    def images(number: int) -> Tensor:
        return torch.randn(number, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)

    return Batch(
        images(labeled + len(method.unlabeled_views) * unlabeled),
        torch.randint(0, K, (labeled,), generator=generator),
        torch.arange(labeled),
        torch.arange(unlabeled),
        torch.full((unlabeled,), -1),
        labeled_strong_images=images(labeled) if method.labeled_strong_view else None,
    )


def answer(network: nn.Module, images: Tensor, head: nn.Module | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Logits, normalized by these images' own statistics, and mean and unbiased variance that running ones take in.

    head: None is the network's classifier.
    """
    x = F.conv2d(images, network.backbone.conv.weight, padding=1)
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    return _classify(network, x, mean, variance, head or network.head), (mean, x.var((0, 2, 3)))


def averaged_answer(network: nn.Module, images: Tensor) -> Tensor:
    """Logits, normalized by the running statistics."""
    x, bn = F.conv2d(images, network.backbone.conv.weight, padding=1), network.backbone.bn
    return _classify(network, x, bn.running_mean, bn.running_var, network.head)


def _classify(network: nn.Module, x: Tensor, mean: Tensor, variance: Tensor, head: nn.Module) -> Tensor:
    bn = network.backbone.bn
    x = (x - mean[:, None, None]) / (variance + bn.eps).sqrt()[:, None, None]
    x = x * bn.weight[:, None, None] + bn.bias[:, None, None]
    return torch.where(x > 0, x, 0.1 * x).mean((2, 3)) @ head.weight.T + head.bias


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each row, towards a distribution."""
    return -(targets * logits.log_softmax(1)).sum(1)


def one_hot(labels: Tensor, classes: int = K) -> Tensor:
    return torch.eye(classes, dtype=torch.float64)[labels]
