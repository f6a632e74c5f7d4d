"""One open image: everything between a read and an object. Knows neither FUSE nor Ceph's bindings."""
