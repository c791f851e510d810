"""Tables on the terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table, its first column aligned left, the others right."""
    first, *others = map(escape, headings)
    table = Table(first, *(Column(heading, justify="right") for heading in others))
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if Console().is_terminal else 160).print(table)
