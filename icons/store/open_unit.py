"""OpenUnit: a unit while its rows arrive, encoded as they will be stored."""

from collections.abc import Callable, Mapping

import numpy as np

Columns = dict[str, np.ndarray]
_Encode = Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], Columns]


class OpenUnit:
    """A unit of which some rows have arrived.

    Args:
        encode: the store's.
        num_rows: of the unit.
        columns: memory for its arrays, of a unit that has been stored; each array that it lacks is made.
    """

    def __init__(self, encode: _Encode, num_rows: int, columns: Columns) -> None:
        self.encode, self.columns = encode, columns
        self.arrived = np.zeros(num_rows, dtype=bool)

    def add(self, position: np.ndarray, results: Mapping[str, np.ndarray]) -> bool:
        """Puts rows at their positions; whether the unit is whole now."""
        rows: np.ndarray | slice = position
        out: Columns = {}
        # in order, as rows of equal length come: they are encoded where they belong
        if (position[1:] == position[:-1] + 1).all():
            rows = slice(int(position[0]), int(position[-1]) + 1)
            out = {name: column[rows] for name, column in self.columns.items()}
        for name, values in self.encode(results, out).items():
            if name not in self.columns:
                self.columns[name] = np.empty((len(self.arrived), *values.shape[1:]), values.dtype)
            if values is not out.get(name):
                self.columns[name][rows] = values
        self.arrived[rows] = True
        return bool(self.arrived.all())
