"""Is there a GPU that PyTorch cannot use? Without a word an 8B would then run on the CPU."""
import os
import shutil
from pathlib import Path

import torch

SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidia0")


def unusable() -> str | None:
    """What to say where PyTorch was built for CUDA, a driver or device is there, and no GPU can be
    used; None where nothing is amiss or the GPUs are hidden on purpose."""
    cuda = torch.version.cuda
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    there = any(Path(sign).exists() for sign in SIGNS) or shutil.which("nvidia-smi")
    if cuda is None or torch.cuda.is_available() or hidden or not there:
        return None
    return (f"there seems to be a GPU, but PyTorch, which was built for CUDA {cuda}, can use none: "
            "is the driver too old? (nvidia-smi shows it)")
