"""`python -m octavo.refresh DIR`: code of today for a directory that an older version converted."""

import sys

from .common.convert.refresh import main

if __name__ == "__main__":
    sys.exit(main())
