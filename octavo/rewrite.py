"""`python -m octavo.rewrite`."""

import sys

from .common.convert.dialects.rewriting import main

if __name__ == "__main__":
    sys.exit(main())
