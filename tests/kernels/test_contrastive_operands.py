"""What products of prepared vectors lose, beside what TF32 would lose, measured against float64."""

import os

import numpy as np
import pytest
import torch

from bacon_fast.kernels.contrastive_forward import prepare

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to the 10 stored bits of TF32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFF) + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)).view(np.float32)


def products(parts: list[np.ndarray]) -> np.ndarray:
    """As kernels add them up, but exactly: high by high, and high by low both ways."""
    high, *rest = (part.astype(np.float64) for part in parts)
    total = high @ high.T
    for low in rest:
        total += high @ low.T + low @ high.T
    return total


@pytest.mark.parametrize("spread", [1.0, 1e6], ids=["equal", "spread"])
@pytest.mark.parametrize("precision", ["tf32x3", "tf32"])
def test_float32_loses_no_more_than_tf32_products_do(precision, spread):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 128, generator=generator) * 10 ** (6 * torch.rand(200, 1, generator=generator) - 3)
    vectors[:, ::3] /= spread  # elements far below the largest of their vector
    operands, scale = prepare(vectors, 1e-12, precision)
    assert operands.dtype == torch.float16 and operands.shape[0] == (2 if precision == "tf32x3" else 1)
    norm = vectors.double().norm(dim=1)
    power = 2.0 ** (1 / (norm * scale[:200].double())).log2().round()
    scaled = (vectors * power[:, None].float()).numpy()  # exactly

    length = (norm * power).numpy()[:, None]
    exact = products([scaled])
    error = np.abs((products([part[:200].numpy() for part in operands]) - exact) / length / length.T).max()
    high = tf32(scaled)
    parts = [high, tf32(scaled - high)] if precision == "tf32x3" else [high]
    by_tf32 = np.abs((products(parts) - exact) / length / length.T).max()
    assert error <= 1.1 * by_tf32
    assert error <= (2e-7 if precision == "tf32x3" else 5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 3e4])
def test_half_precision_is_multiplied_as_it_is(dtype, magnitude):
    """Scaled by a power of two, so without rounding, to a norm in (2^11, 2^12]; padded by zeros of scale 0."""
    vectors = (torch.randn(5, 40, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) * magnitude).to(dtype)
    operands, scale = prepare(vectors, 1e-12, "tf32")
    assert operands.shape == (1, 128, 64) and not operands[0, 5:].any() and not operands[0, :, 40:].any()
    assert not scale[5:].any()
    norm = operands[0, :5].double().norm(dim=1)
    assert ((norm >= 2**11 * (1 - 1e-6)) & (norm <= 2**12 * (1 + 1e-6))).all()
    unit = operands[0, :5, :40].double() * scale[:5, None]
    torch.testing.assert_close(unit, torch.nn.functional.normalize(vectors.double(), dim=1), rtol=2e-7, atol=1e-10)
    vectors[2, 7] = torch.nan
    operands, scale = prepare(vectors, 1e-12, "tf32")
    assert scale[2].isnan() and not operands[0, 2].any() and scale[[0, 1, 3, 4]].isfinite().all()
