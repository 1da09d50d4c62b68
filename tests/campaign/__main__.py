"""The command line of the campaign."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
