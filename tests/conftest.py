"""Settings that have to be made before any test module is imported."""

import os

import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
