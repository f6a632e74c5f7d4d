"""How long tests wait."""

HUNG_SECONDS = 300.0
"""No test uses its mount for longer; an OSD that is started on a busy machine has taken 80 s."""
