"""Is there a GPU that PyTorch cannot use? Without a word an 8B would then run on the CPU."""
import os
import shutil
from pathlib import Path

import torch

SIGNS = ("/proc/driver/nvidia/version", "/dev/nvidia0")
OLDEST = {"12": 525, "13": 580}                        # driver that a release of CUDA asks for


def unusable() -> str | None:
    """What to say where PyTorch was built for CUDA, a driver or device is there, and no GPU can be
    used; None where nothing is amiss or the GPUs are hidden on purpose."""
    cuda = torch.version.cuda
    if cuda is None or torch.cuda.is_available():
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    if not any(Path(sign).exists() for sign in SIGNS) and not shutil.which("nvidia-smi"):
        return None
    line = f"there seems to be a GPU, but PyTorch, which was built for CUDA {cuda}, can use none"
    oldest = OLDEST.get(cuda.partition(".")[0])
    if oldest:
        line += f"; it asks for driver {oldest} or later (nvidia-smi shows yours)"
    return line
