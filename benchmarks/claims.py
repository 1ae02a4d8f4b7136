"""What rows of families.py say about two claims, as data and as Markdown. No number is made here."""

from typing import Any

THESIS = ("ddpm", "vp", "subvp", "ve", "ct", "ct-perceptual")  # the families that claim 1 was made about
DIFFUSION = ("ddpm", "iddpm", "vp", "subvp", "ve", "edm", "flow")
PERCEPTUAL = ("ct-perceptual", "cd-perceptual")
PLAIN = ("ct", "ict", "cd-l2", "cd-huber", "ect")
FEW = 2  # evaluations of "few-step"
CLEAR = 0.05  # a lead below 5 % is called a tie: rows of 1,000 images differ by a few per cent from seed to seed
COMPARABLE = 1.5  # "matches": FD at most this times that of the diffusion models' best
Row = dict[str, Any]


def judge(rows: list[Row]) -> dict[str, Any]:
    """Both claims, with the cells they were read from."""
    return {"ddpm_best_at_equal_steps": first_claim(rows), "consistency_needs_perceptual": second_claim(rows)}


def first_claim(rows: list[Row]) -> dict[str, Any]:
    """For each sampler's view and number of evaluations: who has the least FD, and is it DDPM?"""
    cells = []
    for view in ("own", "ddim", "unipc", "best"):
        for nfe in sorted({r["nfe"] for r in rows}):
            cell = _ranking(rows, view, nfe)
            if "ddpm" in cell and sum(family in THESIS for family in cell) > 1:
                cells.append(_cell(view, nfe, cell))
    won, lost = sum(c["outcome"] == "holds" for c in cells), sum(c["outcome"] == "fails" for c in cells)
    if won == lost == 0:
        verdict = "tied" if cells else "nothing measured yet"
    else:
        verdict = "holds" if won == len(cells) else "fails" if lost == len(cells) else "depends on sampler and steps"
    return {"verdict": verdict, "held": won, "failed": lost, "tied": len(cells) - won - lost, "cells": cells}


def _ranking(rows: list[Row], view: str, nfe: int) -> dict[str, float]:
    """FD of each family in this view. Consistency models have one sampler, which stands in every view."""
    fds: dict[str, list[float]] = {}
    for r in rows:
        own = r is _first_sampler(rows, r["family"], nfe)
        fits = view == "best" or (view == "own" and own) or r["asked"] == view or r["asked"] == "consistency"
        if r["nfe"] == nfe and fits:
            fds.setdefault(r["family"], []).append(r["fd"])
    return {family: min(values) for family, values in fds.items()}


def _first_sampler(rows: list[Row], family: str, nfe: int) -> Row | None:
    """A family's rows begin with its own sampler."""
    of_family = [r for r in rows if r["family"] == family]
    return next((r for r in of_family if r["nfe"] == nfe and r["asked"] == of_family[0]["asked"]), None)


def _cell(view: str, nfe: int, fds: dict[str, float]) -> dict[str, Any]:
    among = {f: v for f, v in fds.items() if f in THESIS}
    others = [v for f, v in among.items() if f != "ddpm"]
    ahead = min(others, default=float("inf")) / fds["ddpm"]  # > 1: DDPM leads
    outcome = "holds" if ahead > 1 + CLEAR else "fails" if ahead < 1 - CLEAR else "tied"
    return {
        "view": view,
        "nfe": nfe,
        "outcome": outcome,
        "best": min(among, key=among.__getitem__),
        "best_of_all": min(fds, key=fds.__getitem__),
        "fd": dict(sorted(fds.items(), key=lambda item: item[1])),
    }


def second_claim(rows: list[Row]) -> dict[str, Any]:
    """The diffusion models' best FD at any number of evaluations, against each consistency model's at one or two."""
    diffusion = [r for r in rows if r["family"] in DIFFUSION]
    few = {
        family: min((r for r in rows if r["family"] == family and r["nfe"] <= FEW), key=lambda r: r["fd"])
        for family in (*PERCEPTUAL, *PLAIN)
        if any(r["family"] == family and r["nfe"] <= FEW for r in rows)
    }
    if not diffusion or not few:
        return {"verdict": "nothing measured yet"}
    target = min(diffusion, key=lambda r: r["fd"])
    matching = [family for family, r in few.items() if r["fd"] <= COMPARABLE * target["fd"]]
    with_, without = [f for f in matching if f in PERCEPTUAL], [f for f in matching if f in PLAIN]
    if without:
        verdict = "fails: " + ", ".join(without) + " match without a perceptual loss"
    elif with_ and any(f in PLAIN for f in few):
        verdict = "holds: only " + ", ".join(with_) + " match"
    else:
        verdict = (
            "undecided: no consistency model matches"
            if not with_
            else "undecided: none without a perceptual loss was trained"
        )
    return {
        "verdict": verdict,
        "diffusion": {k: target[k] for k in ("family", "asked", "nfe", "fd")},
        "bound": COMPARABLE * target["fd"],
        "consistency": {f: {k: r[k] for k in ("nfe", "fd", "agreement")} for f, r in few.items()},
    }


def markdown(rows: list[Row], runs: dict[str, Row], judged: dict[str, Any], header: Row) -> str:
    """The tables and the verdicts."""
    lines = ["# Families on MNIST", ""]
    lines += [f"{header['device']}, torch {header['versions'].get('torch')}, {header['date']}.", ""]
    lines += ["| family | training images | minutes |", "|---|---|---|"]
    lines += [f"| {name} | {run['images']:,} | {run['minutes']:.1f} |" for name, run in runs.items()]
    lines += [
        "",
        "FD is the Frechet distance in features of the packaged LeNet (no FID) to one half of the training images; floor:",
        "of as many real images of the other half. Agreement: how often the LeNet reads the digit that was asked for.",
        "",
    ]
    lines += ["| family | sampler | NFE | n | FD | floor | agreement | images/s |", "|---|---|---|---|---|---|---|---|"]
    for r in rows:
        agreement = "-" if r["agreement"] is None else f"{r['agreement']:.1%}"
        lines.append(
            f"| {r['family']} | {r['asked']} | {r['nfe']} | {r['n']:,} | {r['fd']:.2f} | {r['floor']:.2f} | {agreement} | "
            f"{r['images_per_second']:.1f} |"
        )
    return (
        "\n".join(
            [*lines, "", *_first(judged["ddpm_best_at_equal_steps"]), "", *_second(judged["consistency_needs_perceptual"])]
        )
        + "\n"
    )


def _first(claim: dict[str, Any]) -> list[str]:
    counted = f"{claim['held']} of {len(claim['cells'])} comparisons hold, {claim['failed']} fail, {claim['tied']} are tied"
    lines = [f"**Claim 1, DDPM has the lowest FD at equal steps: {claim['verdict']}** ({counted})."]
    lines += ["Compared are " + ", ".join(THESIS) + "; the last column says who leads if all families count.", ""]
    lines += ["| sampler | NFE | claim | least FD | of all families |", "|---|---|---|---|---|"]
    names = {"own": "each family's own", "best": "each family's best"}
    for c in claim["cells"]:
        best, every = (f"{f} {c['fd'][f]:.2f}" for f in (c["best"], c["best_of_all"]))
        lines.append(f"| {names.get(c['view'], c['view'])} | {c['nfe']} | {c['outcome']} | {best} | {every} |")
    return lines


def _second(claim: dict[str, Any]) -> list[str]:
    lines = [f"**Claim 2, consistency models match in {FEW} steps only with a perceptual loss: {claim['verdict']}.**"]
    if "bound" not in claim:
        return lines
    d = claim["diffusion"]
    lines += [
        f"The diffusion models' best is {d['family']} by {d['asked']} at {d['nfe']} evaluations, FD {d['fd']:.2f}; to match",
        f"is to stay within {COMPARABLE} times that, {claim['bound']:.2f}.",
        "",
    ]
    lines += ["| consistency model | NFE | FD | agreement | matches |", "|---|---|---|---|---|"]
    for family, r in claim["consistency"].items():
        agreement = "-" if r["agreement"] is None else f"{r['agreement']:.1%}"
        matches = "yes" if r["fd"] <= claim["bound"] else "no"
        lines.append(f"| {family} | {r['nfe']} | {r['fd']:.2f} | {agreement} | {matches} |")
    return lines
