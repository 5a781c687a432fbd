"""Kernels of our own, each with a plain torch path beside it."""
