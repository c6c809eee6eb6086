"""`python -m vidgen`."""

import sys

from vidgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
