"""README's numbers come from the committed results."""

import subprocess
import sys

from ..support import REPOSITORY


def test_readme_says_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / "tables.py"), "--check"])
    assert done.returncode == 0, "run: python benchmarks/tables.py"
