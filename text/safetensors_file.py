"""Writing a safetensors file. Reading one is llama.py's business."""
from pathlib import Path

from safetensors import TensorSpec, serialize
from torch import Tensor


def save(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Write `tensors`, contiguous and on the CPU. The library's own `save_file` does the same, but
    asks for NumPy, and leaves a file that its owner alone may read."""
    assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors.values())
    specs = {name: TensorSpec(dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape),
                              data_ptr=t.data_ptr(), data_len=t.nbytes)
             for name, t in tensors.items()}
    Path(path).write_bytes(serialize(specs, metadata))
