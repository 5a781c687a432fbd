"""Losses that a client has traced with torch.fx and sent as plain data.

graph.py reads such data into a program of operations from operations.py, our own list; nothing of it is ever
evaluated, imported or unpickled. program.py runs a program on one datum, within bounds on what it makes and
how long it works, which costs.py foresees before anything is done.
"""

from __future__ import annotations

from tinsmith.engine.losses.custom.graph import read_program
from tinsmith.engine.losses.custom.loss import custom_loss

__all__ = ["custom_loss", "read_program"]
