"""Benchmarks: every figure beside a yardstick measured in the same run."""

GROUPS = ("transfers", "remote", "disk", "leader", "registry", "replay", "engines")
"""What can be measured, in this order."""
