"""The writer of safetensors files."""
import pytest

from llama import safe_open, torch
from text.safetensors_file import save


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_what_was_written_is_read_again_by_all_who_may_read_files_here(tmp_path, dtype):
    """Rejects another dtype, order or name, and a file that its owner alone may read."""
    tensors = {"a": torch.arange(6).view(2, 3).to(dtype), "b": torch.zeros(0, 4, dtype=dtype)}
    (tmp_path / "other").touch()
    for _ in range(2):                                 # new, then over the old
        save(tensors, tmp_path / "x", {"format": "pt"})
        with safe_open(tmp_path / "x", "pt") as f:
            assert f.metadata() == {"format": "pt"} and set(f.keys()) == {"a", "b"}
            assert all(f.get_tensor(name).equal(t) for name, t in tensors.items())
        assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_transposed_tensor_is_no_bytes_to_write(tmp_path):
    """Rejects a file whose matrices are silently transposed."""
    with pytest.raises(AssertionError):
        save({"a": torch.zeros(2, 3).t()}, tmp_path / "x", {})
