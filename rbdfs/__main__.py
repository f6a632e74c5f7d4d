"""`python -m rbdfs`."""

import sys

from rbdfs.cli import main

if __name__ == "__main__":
    sys.exit(main())
