"""What the small examples print: a title, named columns, and rows as they come."""


class Table:
    """Prints its title and the names of its columns at once, and each row when it is there."""

    def __init__(self, title: str, *columns: str, first: int = 14):
        self.widths = [first, *(max(len(name), 9) for name in columns[1:])]
        print(f"\n{title}")
        self.row(*columns)

    def row(self, *cells: str) -> None:
        name, *others = (str(cell).rjust(width) for cell, width in zip(cells, self.widths, strict=True))
        print("  " + "   ".join([name.strip().ljust(self.widths[0]), *others]), flush=True)
