"""The network's heads: which one predicts."""

import torch

from bacon_fast.models.network import Network


def test_the_balanced_head_predicts_where_there_is_one():
    torch.manual_seed(0)
    images = torch.randn(3, 3, 8, 8)
    for balanced in (False, True):
        network = Network("wrn-10-1", 4, balanced_head=balanced, bn_momentum=0.1).eval()
        features, logits = network.predict(images)
        expected = network.backbone(images)
        head = network.balanced_head if balanced else network.head
        assert torch.equal(features, expected)
        torch.testing.assert_close(logits, expected @ head.weight.T + head.bias)


def test_batchnorm_takes_the_momentum():
    network = Network("wrn-10-1", 4, balanced_head=False, bn_momentum=0.25)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and {m.momentum for m in norms} == {0.25}
