"""Bodies, results, checkpoints and snapshots: what is too big for a row."""

from .local import LocalBlobs

__all__ = ["LocalBlobs"]
