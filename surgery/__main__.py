"""``python -m surgery`` is the command ``surgery``."""

import sys

from surgery.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
