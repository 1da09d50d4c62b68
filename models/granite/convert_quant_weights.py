"""Convert a Granite checkpoint into a quantized one; `--help` lists the flags, README.md explains them."""

import sys

try:
    from octavo.common.convert.api import main
    from octavo.models.granite import ARCHITECTURE
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'make setup' once and then .venv/bin/python instead of python")

if __name__ == "__main__":
    sys.exit(main(ARCHITECTURE))
