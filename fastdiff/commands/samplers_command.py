"""`fastdiff samplers`."""

import typer

from fastdiff.samplers import SAMPLERS


def run() -> None:
    """A line for every sampler: order of convergence, allowed evaluations, paper."""
    rows = [("sampler", "order", "nfe", "paper"), *((k, s.order, s.nfe, s.paper) for k, s in SAMPLERS.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        typer.echo(f"{cells}  {row[3]}")
