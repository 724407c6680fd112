"""What figures were measured on, as their files say it."""

import datetime
import os
import platform

import pyarrow as pa
import torch
import triton


def device() -> str:
    """The GPU, or the cores where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()}-core CPU machine"


def measured_on() -> dict[str, str | int | None]:
    """The machine, the versions and the day."""
    return {
        "device": device(),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "pyarrow": pa.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
