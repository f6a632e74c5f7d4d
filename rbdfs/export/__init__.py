"""Copies of images in files, block devices and pipes. Knows neither Ceph nor FUSE."""
