"""The writer of safetensors files."""
import pytest

from llama import safe_open, torch
from text.safetensors_file import save


def test_what_was_written_is_read_again_by_all_who_may_read_files_here(tmp_path):
    """Rejects another dtype, order or name, a file that its owner alone may read, and matrices that
    are silently transposed."""
    tensors = {str(dtype): torch.arange(6).view(2, 3).to(dtype)
               for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64)}
    (tmp_path / "other").touch()
    save(tensors, tmp_path / "x", {"format": "pt"})
    with safe_open(tmp_path / "x", "pt") as f:
        assert f.metadata() == {"format": "pt"} and f.keys() == sorted(tensors)
        assert all(f.get_tensor(name).equal(t) for name, t in tensors.items())
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode
    with pytest.raises(AssertionError):
        save({"a": torch.zeros(2, 3).t()}, tmp_path / "x", {})
