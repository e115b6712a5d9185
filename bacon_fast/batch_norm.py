"""Batch normalization with the residual sum before and the LeakyReLU after it: the public function."""

from torch import Tensor

from . import batch_norm_ops, ops
from .checks import check_devices, check_kind, check_number, check_shape


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """LeakyReLU(BatchNorm(x + residual)) and x + residual, what a pre-activation residual block begins with.

    BatchNorm: Ioffe and Szegedy, ICML 2015; pre-activation blocks: He et al., ECCV 2016. The formula, and in training
    what happens to the running statistics: `reference.batch_norm.batch_norm_act`.

    Args:
        x: [N,C,H,W] float. Statistics of float16 and bfloat16 are computed in float32. The fused backends read memory
            format channels_last and convert other formats to it.
        weight, bias: [C] float, scale and shift of the normalized values.
        running_mean, running_var: [C] float, in training updated in place (both None: nothing is), else read.
        num_batches_tracked: 0-d int64 or None, in training incremented in place.
        residual: as x, same dtype; added to x first.
        training: normalize with the statistics of this batch instead of the running ones.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        negative_slope: of the LeakyReLU; 0 is ReLU, 1 no activation.
        backend: None for the best one, "reference", "cpp" or "triton". Without ``training`` always the reference.

    Returns:
        (activated, sum), both [N,C,H,W] in the dtype of x; the sum is x itself without a residual. Both are
        differentiable, once, by x, residual, weight and bias.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        RuntimeError: the named backend is not available here; or the gradient is differentiated and the backend is not
            "reference".
    """
    check_shape("x", x, "N", "C", "H", "W")
    check_kind("x", x, "float")
    channels = x.shape[1]
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, tensor in vectors.items():
        if tensor is not None or name in ("weight", "bias"):
            check_shape(name, tensor, channels)
            check_kind(name, tensor, "float")
            if name.startswith("running") and not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_var: expected both running_mean and running_var, or neither")
    if num_batches_tracked is not None:
        check_shape("num_batches_tracked", num_batches_tracked)
        check_kind("num_batches_tracked", num_batches_tracked, "int64")
    if residual is not None:
        check_shape("residual", residual, *x.shape)
        if residual.dtype != x.dtype:
            raise TypeError(f"residual: expected dtype {x.dtype}, that of x, found {residual.dtype}")
    check_devices("x", x, **vectors, num_batches_tracked=num_batches_tracked, residual=residual)
    if not training and running_mean is None:
        raise ValueError("running_mean: expected a tensor, as training is False, found None")
    if training and x.numel() <= channels:
        raise ValueError(f"x: expected more than one value per channel when training, found shape {list(x.shape)}")
    check_number("momentum", momentum, low=0, low_allowed=True)
    check_number("eps", eps, low=0)
    check_number("negative_slope", negative_slope, low=0, low_allowed=True)
    if backend is None:
        backend = batch_norm_ops.default_backend(x)
    run = ops.choose_backend("batch_norm_act", backend, x)
    return run(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        residual,
        training,
        momentum,
        eps,
        negative_slope,
    )
