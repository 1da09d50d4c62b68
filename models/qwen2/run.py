"""Generate text, or chat, with a converted Qwen2 checkpoint; `--help` lists the flags."""

import sys

try:
    from octavo.generate import main
    from octavo.models.qwen2 import ARCHITECTURE
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'make setup' once and then .venv/bin/python instead of python")

if __name__ == "__main__":
    sys.exit(main(ARCHITECTURE))
