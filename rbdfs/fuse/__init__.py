"""The kernel's side: the only folder that imports pyfuse3."""
