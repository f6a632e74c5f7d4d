"""How long tests wait."""

HUNG_SECONDS = 120.0
"""No test uses its mount for longer."""
