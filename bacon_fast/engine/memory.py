"""Telling an exhausted memory from other errors."""

import torch

# Parts of the messages of RuntimeErrors by which torch and CUDA's libraries report it, beside their own types.
_MESSAGES = ("DefaultCPUAllocator", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that the host or a device has not enough memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
