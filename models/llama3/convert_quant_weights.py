"""Convert a Llama checkpoint into a quantized one; `--help` lists the flags, README.md explains them."""

import sys

from octavo.common.convert import main
from octavo.models.llama3 import ARCHITECTURE

if __name__ == "__main__":
    sys.exit(main(ARCHITECTURE))
