"""Each figure the README quotes, measured against its peers in the same run: `python -m tests.benchmarks`."""
