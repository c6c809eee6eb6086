"""The entry for all benches: `python tools/bench.py render|model [--lengths 65,257,1025] [--json FILE]`.

The same as `vidgen bench`, for a checkout that is not installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vidgen.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
