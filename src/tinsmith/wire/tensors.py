"""What is common to tensors in JSON and in protobuf."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def csr_problem(
    rows: int, columns: int, crow: npt.NDArray[np.int64], col: npt.NDArray[np.int64], values: int
) -> str:
    """What is wrong with a CSR tensor's indices; empty where nothing is."""
    valid = (
        crow.size == rows + 1
        and crow[0] == 0
        and bool((np.diff(crow) >= 0).all())
        and int(crow[-1]) == col.size == values
        and (col.size == 0 or (int(col.min()) >= 0 and int(col.max()) < columns))
    )
    if valid:
        return ""
    return (
        f"not a CSR tensor of shape [{rows}, {columns}]: {crow.size} row pointers, {col.size} columns, "
        f"{values} values"
    )
