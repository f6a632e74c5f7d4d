"""Where an exported image goes: a file, a block device, a pipe. Knows neither Ceph nor FUSE."""
