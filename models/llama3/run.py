"""Generate text, or chat, with a converted Llama checkpoint; `--help` lists the flags."""

import sys

from octavo.common.run import main
from octavo.models.llama3 import ARCHITECTURE

if __name__ == "__main__":
    sys.exit(main(ARCHITECTURE))
