"""A real single-node Ceph in one folder, to try things on and to test against.

A mon, a mgr and some OSDs from Debian's packages, on loopback, with cephx, owned by whoever starts them. All that they
write is in the folder (only sockets move to a short folder under /tmp if its own name is too long for a socket), so
taking it down leaves nothing behind.
"""
