"""Generate text, or chat, with a converted Mistral checkpoint; `--help` lists the flags."""

import sys

try:
    from octavo.generate import main
    from octavo.models.mistral import ARCHITECTURE
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'make setup' once and then .venv/bin/python instead of python")

if __name__ == "__main__":
    sys.exit(main(ARCHITECTURE))
