"""The benchmark of cached features: its gate lets the right features pass, and no others."""

import pytest
import torch

from benchmarks import cached_features
from benchmarks.cached_features import ARMS, build, check, write_problem


def test_the_gate_compares_kept_features_with_a_forward_pass(tmp_path, monkeypatch):
    pytest.importorskip("timm", reason="the backbone needs the extra timm")
    monkeypatch.setattr(cached_features, "MODEL", "test_vit")
    problem = write_problem(tmp_path)
    kept, fresh = (
        build(tmp_path / str(views), *problem, 2, {"cached_views": views, "image_size": 32, "stored_size": 36})
        for views in (2, 0)
    )
    for trainer in (kept, fresh):
        trainer.logger.close()
    check(kept, fresh)
    kept.batches.pool[2] += 0.1
    with pytest.raises(AssertionError, match="not close"):
        check(kept, fresh)
    assert [name for name, changes in ARMS.items() if changes["cached_views"]] == ["heads on kept features"]
    assert kept.batches.pool.shape == (24, torch.load(problem[1])["norm.weight"].numel())
