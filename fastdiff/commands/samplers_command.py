"""`fastdiff samplers`."""

import typer

from fastdiff.samplers import SAMPLERS


def run() -> None:
    """A line for every sampler: order of convergence, allowed evaluations, paper."""
    listed = [(k, s.order, s.nfe, s.paper) for k, s in SAMPLERS.items()]
    listed.append(("rk45", "5", "counted", "Dormand and Prince 1980; Song et al. 2021"))
    rows = [("sampler", "order", "nfe", "paper"), *sorted(listed)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True))
        typer.echo(f"{cells}  {row[3]}")
