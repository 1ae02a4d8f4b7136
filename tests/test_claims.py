"""What benchmarks/claims.py concludes from rows whose meaning is plain."""

import claims
import pytest


def row(family, asked, nfe, fd):
    return {"family": family, "asked": asked, "nfe": nfe, "fd": fd, "n": 10, "floor": 1.0, "agreement": 0.5,
            "images_per_second": 9.0}  # fmt: skip


def table(ddpm, vp):
    """FD of both families by their own samplers and by DDIM, at two numbers of evaluations."""
    rows = []
    for family, own, values in (("ddpm", "ddpm", ddpm), ("vp", "euler-maruyama", vp)):
        cells = iter(values)
        rows += [row(family, sampler, nfe, next(cells)) for sampler in (own, "ddim") for nfe in (4, 10)]
    return rows


@pytest.mark.parametrize(
    ("ddpm", "vp", "verdict"),
    [
        ((2, 1, 2, 1), (4, 3, 4, 3), "holds"),
        ((4, 3, 4, 3), (2, 1, 2, 1), "fails"),
        ((2, 1, 4, 3), (4, 3, 2, 1), "depends on sampler and steps"),
        ((2, 2, 2, 2), (2.05, 2.05, 2.05, 2.05), "tied"),  # a tie is no lead
    ],
)
def test_first_claim(ddpm, vp, verdict):
    found = claims.first_claim(table(ddpm, vp))
    assert found["verdict"] == verdict
    assert {c["view"] for c in found["cells"]} == {"own", "ddim", "best"}
    cell = next(c for c in found["cells"] if (c["view"], c["nfe"]) == ("ddim", 10))
    assert cell["fd"] == {"ddpm": ddpm[3], "vp": vp[3]}


def test_first_claim_is_about_its_families():
    """EDM may lead; that is said, and does not decide a claim that was made without it."""
    rows = [row("ddpm", "ddpm", 4, 2.0), row("vp", "euler-maruyama", 4, 3.0), row("edm", "heun", 4, 1.0)]
    cell = next(c for c in claims.first_claim(rows)["cells"] if c["view"] == "own")
    assert (cell["outcome"], cell["best"], cell["best_of_all"]) == ("holds", "ddpm", "edm")


@pytest.mark.parametrize(
    ("plain", "perceptual", "verdict"),
    [
        (9.0, 1.2, "holds: only cd-perceptual match"),
        (1.2, 1.2, "fails: cd-l2 match without a perceptual loss"),
        (9.0, 9.0, "undecided: no consistency model matches"),
        (None, 1.2, "undecided: none without a perceptual loss was trained"),
    ],
)
def test_second_claim(plain, perceptual, verdict):
    rows = [row("edm", "heun", 35, 1.0), row("edm", "heun", 1, 50.0)]
    rows += [row("cd-perceptual", "consistency", 2, perceptual), row("cd-perceptual", "consistency", 35, 0.1)]
    rows += [] if plain is None else [row("cd-l2", "consistency", 1, 30.0), row("cd-l2", "consistency", 2, plain)]
    found = claims.second_claim(rows)
    assert found["verdict"] == verdict and found["bound"] == claims.COMPARABLE
    assert found["consistency"]["cd-perceptual"]["nfe"] == 2, "more than two evaluations are not few"


def test_markdown():
    rows = [*table((2, 1, 2, 1), (4, 3, 4, 3)), row("cd-l2", "consistency", 2, 9.0)]
    header = {"device": "a CPU", "versions": {"torch": "2"}, "date": "today"}
    text = claims.markdown(rows, {"ddpm": {"images": 1000, "minutes": 2.5}}, claims.judge(rows), header)
    assert "| ddpm | 1,000 | 2.5 |" in text and "| vp | ddim | 10 | 10 | 3.00 | 1.00 | 50.0% | 9.0 |" in text
    assert "Claim 1, DDPM has the lowest FD at equal steps: holds" in text and "| cd-l2 | 2 | 9.00 | 50.0% | no |" in text
    assert claims.judge([])["consistency_needs_perceptual"] == {"verdict": "nothing measured yet"}
