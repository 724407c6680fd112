"""Session-wide set-up: without a GPU, Triton kernels run in the interpreter, chosen before Triton is imported."""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
