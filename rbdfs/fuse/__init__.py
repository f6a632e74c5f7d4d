"""The kernel's side: the only folder that imports pyfuse3.

Python runs this file before any other of the folder, so lowlevel's C library is there before pyfuse3 is.
"""

from rbdfs.fuse import lowlevel as _lowlevel  # noqa: F401
