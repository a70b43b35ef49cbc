"""A table of numbers: columns of one length by name, with their units."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vistvis.errors import InputError
from vistvis.files import atomic_file
from vistvis.names import html_table, suggestion

if TYPE_CHECKING:
    import pandas as pd

Column = NDArray[Any]


class Table:
    """Numbers in columns, one line for each of what `keys` name.

    Parameters
    ----------
    columns
        Arrays `(lines,)` by name. Where a line has no such number it is NaN.
    keys
        The columns that say what a line is about: no two lines have the same in all of them.
    units
        What the numbers of a column are in, by name; a column without one is a plain name or count.

    `table["entropy"]` is a column, `len(table)` the number of lines. `InputError` for columns that
    do not fit together and for names that are not there.
    """

    def __init__(
        self,
        columns: Mapping[str, Any],
        *,
        keys: Sequence[str] = (),
        units: Mapping[str, str] | None = None,
    ) -> None:
        self.columns = {name: np.asarray(column) for name, column in columns.items()}
        shapes = {column.shape for column in self.columns.values()}
        if len(shapes) > 1 or any(len(shape) != 1 for shape in shapes):
            raise InputError(f"columns have one dimension and one length, got {sorted(shapes)}")
        self.keys = tuple(keys)
        for name in self.keys:
            self[name]
        self.units = {name: unit for name, unit in (units or {}).items() if name in self.columns}

    def __getitem__(self, name: str) -> Column:
        if name not in self.columns:
            hint = suggestion(str(name), self.columns, otherwise="columns are in .columns")
            raise InputError(f"no column {name!r} among {', '.join(self.columns)}; {hint}")
        return self.columns[name]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __repr__(self) -> str:
        return f"Table({len(self)} lines of {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        head = [f"{n} ({self.units[n]})" if n in self.units else n for n in self.columns]
        lines = [tuple(map(_text, line)) for line in zip(*self.columns.values(), strict=True)]
        return html_table([tuple(head), *lines])

    def where(self, **values: Any) -> Table:
        """The lines whose columns have these values: `table.where(site="global_block_3")`."""
        chosen = np.ones(len(self), bool)
        for name, value in values.items():
            chosen &= self[name] == value
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Table(columns, keys=self.keys, units=self.units)

    def to_pandas(self) -> pd.DataFrame:
        """As a data frame, units in `.attrs["units"]`; ModuleNotFoundError without pandas."""
        import pandas as pd

        frame = pd.DataFrame(self.columns)
        frame.attrs["units"] = dict(self.units)
        return frame

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a file, whole or not at all; its ending says of which form.

        `.csv` has a head line; `.npz` an array for each column, and `units` as JSON; `.parquet`,
        which needs pyarrow, has the units in the metadata of its schema. InputError for others.
        """
        path = Path(path)
        write = _WRITERS.get(path.suffix.lower())
        if write is None:
            raise InputError(f"a table is saved as {', '.join(_WRITERS)}; got {path.name!r}")
        data = write(self)
        with atomic_file(path) as file:
            file.write(data)
        return path

    def compare(self, other: Table) -> Table:
        """This table beside another of the same kind: two checkpoints, or two runs.

        Lines are matched by `keys`; of every number there are `name`, `name_other` and, where it
        has a unit, `name_change` = other − this. A line that one of them lacks has NaN on that
        side. InputError where the tables are not about the same, or have no line in common.
        """
        if self.keys != other.keys or not self.keys:
            raise InputError(f"tables that are compared have the same keys: {self.keys} here, "
                             f"{other.keys} there")  # fmt: skip
        here, there = self._by_key(), other._by_key()
        if not here.keys() & there.keys():
            raise InputError(
                f"no line in common: here {_first(here)}, there {_first(there)}; rename sites so "
                "that what is compared has the same name"
            )
        lines = list(dict.fromkeys([*here, *there]))
        columns: dict[str, Any] = {
            name: np.array([line[number] for line in lines])
            for number, name in enumerate(self.keys)
        }
        numbers = [n for n in self.columns if n not in self.keys and n in other.columns]
        numbers = [n for n in numbers if self[n].dtype.kind in "biuf"]
        units = dict(self.units)
        for name in numbers:
            ours, theirs = _taken(self[name], here, lines), _taken(other[name], there, lines)
            made = {name: ours, f"{name}_other": theirs}
            if name in self.units:  # the difference of two numbers of tokens means nothing
                made[f"{name}_change"] = theirs - ours
                units |= dict.fromkeys(made, self.units[name])
            columns |= made
        return Table(columns, keys=self.keys, units=units)

    def _by_key(self) -> dict[tuple[Any, ...], int]:
        lines = zip(*(self[name].tolist() for name in self.keys), strict=True)
        return {line: number for number, line in enumerate(lines)}


def stacked(tables: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """Columns of several tables one after the other; NaN where a table lacks a column."""
    names = dict.fromkeys(name for table in tables for name in table)
    sizes = [len(next(iter(table.values()))) for table in tables]
    return {
        name: np.concatenate(
            [
                np.asarray(table[name]) if name in table else np.full(size, np.nan)
                for table, size in zip(tables, sizes, strict=True)
            ]
        )
        for name in names
    }


def _taken(column: Column, lines: Mapping[Any, int], wanted: Sequence[Any]) -> Column:
    return np.array([column[lines[one]] if one in lines else np.nan for one in wanted], float)


def _first(lines: Mapping[Any, int]) -> str:
    return str(next(iter(lines), "none"))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _csv(table: Table) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    # A float's repr is the shortest text that reads back as the same number.
    writer.writerows(zip(*(column.tolist() for column in table.columns.values()), strict=True))
    return text.getvalue().encode()


def _npz(table: Table) -> bytes:
    data = io.BytesIO()
    arrays: dict[str, Any] = {**table.columns, "units": np.array(json.dumps(table.units))}
    np.savez_compressed(data, **arrays)
    return data.getvalue()


def _parquet(table: Table) -> bytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise InputError(
            "a .parquet file needs pyarrow: pip install pyarrow, or save as .csv or .npz"
        ) from error
    made = pa.table({name: pa.array(column) for name, column in table.columns.items()})
    made = made.replace_schema_metadata({"units": json.dumps(table.units)})
    sink = pa.BufferOutputStream()
    parquet.write_table(made, sink)
    return bytes(sink.getvalue())


_WRITERS: dict[str, Callable[[Table], bytes]] = {
    ".csv": _csv,
    ".npz": _npz,
    ".parquet": _parquet,
}
