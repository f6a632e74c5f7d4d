"""One random history of a cluster, in every mode of a mount, checked against a reference model."""
