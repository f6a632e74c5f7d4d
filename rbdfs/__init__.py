"""rbdfs: every image in a Ceph cluster as a plain file."""

__version__ = "0.1.0"
