"""Operations that a captured step must not call."""

from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique", "_unique2"}


class NoSynchronization(TorchDispatchMode):
    """Refuses the operations that would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in READS, f"{func} reads the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype.is_signed for i in args[1]), f"{func} by a mask reads the device"
        return func(*args, **(kwargs or {}))
