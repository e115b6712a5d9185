"""The images of a run: resident on the device, or left on the host and sent step by step."""

import torch
from torch import Tensor


def resident(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images [M, H, W, 3] on the device. Raises ValueError when they do not fit into a GPU's free memory."""
    if device.type == "cuda" and images.nbytes > (free := torch.cuda.mem_get_info(device)[0]):
        raise ValueError(
            f"images: {images.nbytes / 1e9:.1f} GB do not fit into the {free / 1e9:.1f} GB that are free on {device}; "
            "--images mapped sends each step's images (dataset folder)"
        )
    return images.to(device)


class HostPool:
    """uint8 images [M, H, W, 3] on the host, such as a mapped file, read like a tensor on `device`.

    Args:
        images: uint8 [M, H, W, 3] on the CPU.
        device: where rows are wanted.
    """

    def __init__(self, images: Tensor, device: torch.device) -> None:
        self.images, self.device, self.shape = images, device, images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Rows int64 [n] of any device: uint8 [n, H, W, 3] on `device`. The host waits for the device."""
        return self.images[rows.cpu()].to(self.device)


class Window:
    """The images of one step, in a buffer of fixed address on the device, which `load` fills in stream order.

    The host gathers into one of two pinned buffers while the device may still read from the other, so it waits only for
    the copy of the step before the last.

    Args:
        pool: the images.
        size: n, images of a step.

    Attributes:
        images: uint8 [n, H, W, 3] on the pool's device.
    """

    def __init__(self, pool: HostPool, size: int) -> None:
        shape, cuda = (size, *pool.shape[1:]), pool.device.type == "cuda"
        self.pool = pool
        self.images = torch.empty(shape, dtype=torch.uint8, device=pool.device)
        self._staged = [torch.empty(shape, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
        self._sent = [torch.cuda.Event() if cuda else None for _ in range(2)]

    def load(self, rows: Tensor, step: int) -> None:
        """Fills `images` with these rows of the pool, int64 [n] on the CPU, for the work enqueued afterwards."""
        staged, sent = self._staged[step % 2], self._sent[step % 2]
        if sent is not None:
            sent.synchronize()
        torch.index_select(self.pool.images, 0, rows, out=staged)
        self.images.copy_(staged, non_blocking=True)
        if sent is not None:
            sent.record()
