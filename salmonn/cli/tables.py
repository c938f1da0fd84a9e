"""How commands lay out their figures."""

from collections.abc import Sequence

from rich.table import Table


def new_table(title: str, columns: Sequence[str]) -> Table:
    """An empty table: a column of names, then columns of figures with these heads."""
    table = Table(title=title)
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table
