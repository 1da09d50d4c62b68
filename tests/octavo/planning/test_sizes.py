"""Sizes as people write them."""

import pytest

from octavo import OctavoError
from octavo.planning.sizes import Unit, memory_of, size_of


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24 GiB", 24 * 2**30), ("1.5gib", 3 * 2**29), ("500MB", 5 * 10**8), ("2TiB", 2**41)],
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["24", "24G", "GB", "-1GB", "0GB", "1e3GB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(OctavoError, match=r"is no size; give a number and .*GiB.* such as 24GB or 24GiB"):
        size_of(text)


def test_a_size_is_printed_in_its_unit() -> None:
    gigabytes = Unit("GB")
    assert [gigabytes.number(size) for size in (10**9, 16_060_522_240, 1_234_567, 2 * 10**12 + 1)] == [
        "1", "16.06", "0.001", "2,000"
    ]  # fmt: skip
    assert Unit("MiB").text(4096 * 2**20) == "4,096 MiB"


def test_this_machine_has_some_memory() -> None:
    assert memory_of("cpu") > 2**28
    assert memory_of("npu") is None
