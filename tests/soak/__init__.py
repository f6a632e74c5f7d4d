"""Readers of every kind, while others change images and faults are injected, for as long as one likes."""
