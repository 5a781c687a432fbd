"""Tinsmith: the Tinker training API on hardware that you own."""

__version__ = "0.1.0"
