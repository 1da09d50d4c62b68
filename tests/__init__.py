"""The tests of Octavo; folders mirror the tree."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub library is imported, which reads it once
