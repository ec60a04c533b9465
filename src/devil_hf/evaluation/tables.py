"""The one writer of tables of scores, as text."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from devil_hf.evaluation.results import metric_name
from devil_hf.extras import needs

NOTHING = ""
SIGNED = "{:+.3f}".format  # of differences


def with_interval(value: float, interval: Sequence[float] | None, cell: Callable[[Any], str] = "{:.3f}".format) -> str:
    """A value and its interval (low, high), as text; without one that has no width: whatever was drawn gave the same."""
    if interval is None or interval[0] == interval[1]:
        return cell(value)
    return f"{cell(value)} [{cell(interval[0])}, {cell(interval[1])}]"


def table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str],
    cell: Callable[[Any], str] = "{:.3f}".format,
    intervals: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    names: Mapping[str, str] | None = None,
) -> str:
    """Rows of metrics as text: a line for each, and nothing where a row does not have a metric.

    Args:
        rows: name -> metric -> value.
        columns: the metrics to show; those that no row has are left out.
        cell: writes a value.
        intervals: name -> metric -> (low, high), shown behind the value as `with_interval` does.
        names: of rows, as people call them where that is not their name.

    Raises:
        MissingExtraError: without tabulate.
    """
    needs("tabulate", "evaluate")
    from tabulate import tabulate

    def shown(name: str, column: str) -> str:
        value = rows[name].get(column)
        if value is None:
            return NOTHING
        return with_interval(value, (intervals or {}).get(name, {}).get(column) or None, cell)

    kept = [column for column in columns if any(row.get(column) is not None for row in rows.values())]
    lines = [[(names or {}).get(name, name), *(shown(name, column) for column in kept)] for name in rows]
    heads = ["", *(metric_name(column) for column in kept)]
    align = ("left", *["right"] * len(kept))
    return tabulate(lines, heads, tablefmt="plain", colalign=align, disable_numparse=True, preserve_whitespace=True)
