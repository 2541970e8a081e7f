"""Measurements: what the published code does against what this one does, in the same run."""
