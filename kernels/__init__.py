"""Triton kernels. They run on a GPU and, in Triton's interpreter (TRITON_INTERPRET=1), on a CPU."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import repair

    repair()
