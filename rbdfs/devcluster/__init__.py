"""A real single-node Ceph in one folder, to try things on and to test against.

A mon, a mgr and some OSDs from Debian's packages, on loopback, with cephx, owned by whoever starts them. All that they
write is in the folder (only the admin sockets move to a short folder under /tmp where the folder's own name is too
long for a socket), so taking it down leaves nothing behind.

The daemons run in the foreground (`-f`) in sessions of their own: their pids are known from the moment that they start,
and a terminal's Ctrl-C does not reach them. The folder records each pid with the process's start time.
"""
