"""Pages of mapped files are given back, and nothing but those."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from octavo.common.runtime.checkpoint.mapped import release_pages

VALUES = 1 << 22


def resident_of_files() -> int:
    """Bytes of mapped files that are in the memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    """A tensor of 16 MB that lies in a file, whose last value is 1."""
    if not Path("/proc/self/pagemap").exists():
        pytest.skip("this system does not say which pages are those of a file")
    values = torch.zeros(VALUES)
    values[-1] = 1
    save_file({"values": values}, tmp_path / "file.safetensors")
    return safe_open(tmp_path / "file.safetensors", "pt").get_slice("values")[...]


def test_pages_of_a_file_are_given_back_and_read_again(mapped: torch.Tensor) -> None:
    assert mapped.sum() == 1
    before = resident_of_files()
    assert release_pages(mapped) >= 0.99 * mapped.nbytes
    assert resident_of_files() < before - 0.7 * mapped.nbytes  # which the system counts by some MB
    assert mapped.sum() == 1


def test_what_was_written_to_stays(mapped: torch.Tensor) -> None:
    mapped[VALUES // 2] = 5
    assert release_pages(mapped) == 0
    assert mapped[VALUES // 2] == 5


@pytest.mark.parametrize("values", [torch.ones(VALUES), torch.ones(3), torch.ones(0), torch.ones(64, 64).t()])
def test_what_lies_in_no_file_stays(values: torch.Tensor) -> None:
    assert release_pages(values) == 0
    assert bool((values == 1).all())
