"""`rbdfs`, but the kernel keeps attributes for an hour, and a request has a minute more than --osd-timeout.

For tests of what one request does: on a machine that stands still for a second, another one would come before it, or
its own deadline before librados's.
"""

import sys

from rbdfs.cli import main
from rbdfs.commands import mount
from rbdfs.fuse import attributes

attributes.ENTRY_SECONDS = 3600.0
mount.GRACE_SECONDS = 60.0

if __name__ == "__main__":
    sys.exit(main())
