"""Bring downloaded data into the layouts the readers take: ``python -m minigpt5.data.prepare --help``."""
