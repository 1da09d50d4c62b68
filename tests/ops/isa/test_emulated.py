"""The C kernels of processors that this machine does not have give what their references give, in an emulator.

The tests are those of the ops, which `build` runs there; what is refused before a kernel is called is not tried again.
"""

from types import ModuleType

import pytest

from .. import test_attention, test_codec, test_decoder, test_linear, test_linear_packed

pytestmark = [pytest.mark.usefixtures("build", "two_threads"), pytest.mark.slow]
NOT_OF_KERNELS = ("opcheck", "refused")


def kernel_tests(module: ModuleType) -> dict[str, object]:
    """The tests of the kernels in a module, by names that no other module has."""
    prefix = f"{module.__name__.rsplit('.', 1)[-1]}_"
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    return {
        prefix + name.removeprefix("test_"): test
        for name, test in tests.items()
        if callable(test) and not any(part in name for part in NOT_OF_KERNELS)
    }


for tested in (test_attention, test_codec, test_decoder, test_linear, test_linear_packed):
    globals().update(kernel_tests(tested))
