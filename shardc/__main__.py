"""`python -m shardc` is the command line."""

import sys

from shardc.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
