"""The tests. What transformers copies of remote code goes into a temporary directory, not into the home directory."""

import atexit
import os
import shutil
import tempfile

if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="octavo-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
