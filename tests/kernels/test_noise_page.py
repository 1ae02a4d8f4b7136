"""docs/noise.md says what the reference does: its constants and every vector, and its claims about the range."""

import math
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff.ops.philox_normal import (
    COS_POLY,
    LN2_TIMES_2,
    LOG_POLY,
    SIN_POLY,
    Domain,
    box_muller,
    normal_float32,
    philox_words,
    seed_tensor,
)

ROOT = Path(__file__).parents[2]
PAGE = (Path(__file__).parents[2] / "docs" / "noise.md").read_text()


def rows(language):
    block = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL).group(1)
    return [line.split() for line in block.strip().splitlines()]


def bits(values):
    return [struct.unpack("<I", struct.pack("<f", float(v)))[0] for v in values]


def test_constants():
    found = re.findall(r"\| (2 ln 2|[LSC]\d) \| (\S+) \| `(\S+)` \| `(\w{8})` \|", PAGE)
    want = {"2 ln 2": LN2_TIMES_2}
    for letter, poly in (("L", LOG_POLY), ("S", SIN_POLY), ("C", COS_POLY)):
        want |= {f"{letter}{len(poly) - 1 - i}": c for i, c in enumerate(poly)}
    assert {name for name, *_ in found} == set(want)
    for name, decimal, hexadecimal, pattern in found:
        assert float(decimal) == float.fromhex(hexadecimal) == want[name]
        assert bits([want[name]]) == [int(pattern, 16)]


@pytest.mark.parametrize("row", rows("philox"), ids="-".join)
def test_philox(row):
    c0, c1, c2, c3, k0, k1, *words = (int(word, 16) for word in row)
    block = seed_tensor([c1 << 32 | c0])
    made = philox_words(seed_tensor([k1 << 32 | k0]), block, c2, c3)
    assert [int(w) for w in made] == words


@pytest.mark.parametrize("row", rows("box-muller"), ids="-".join)
def test_box_muller(row):
    a, b = (torch.tensor([int(word, 16)]) for word in row[:2])
    assert bits(torch.cat(box_muller(a, b))) == bits(map(float.fromhex, row[2:]))


@pytest.mark.parametrize("row", rows("normal"), ids=lambda row: "-".join(row[:3]))
def test_normal(row):
    made = normal_float32(seed_tensor([int(row[0], 16)]), int(row[1], 16), int(row[2]), (8,))
    assert bits(made[0]) == bits(map(float.fromhex, row[3:]))


def test_domains():
    found = dict(re.findall(r"\| `([A-Z]+)` \| (\d) \|", PAGE))
    assert {name: int(value) for name, value in found.items()} == {d.name: d.value for d in Domain}


def test_range():
    # The largest radius belongs to word 0; the top 128 words give a zero, and no word a NaN.
    top = float(box_muller(torch.tensor([0]), torch.tensor([0]))[0])
    assert top == float.fromhex("0x1.b0e08ep+2") and abs(top - math.sqrt(66 * math.log(2))) < 2**-22
    edges = torch.cat([torch.arange(2**17), torch.arange(2**31 - 2**16, 2**31 + 2**16), torch.arange(2**32 - 2**17, 2**32)])
    z = torch.stack(box_muller(edges, torch.zeros_like(edges)))[0].abs()
    assert not z.isnan().any() and z.max() == top and int((z == 0).sum()) == 128


@pytest.mark.slow
def test_no_squared_radius_is_negative(tmp_path):
    """All 2^32 first words, in C++: none below zero or NaN, 128 zeros, the largest as on the page. So no kernel clamps."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not here")
    source, program = Path(__file__).with_name("radius.cpp"), tmp_path / "radius"
    flags = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-trapping-math"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    largest = struct.unpack("<f", struct.pack("<I", int(told[2], 16)))[0]
    assert told[:2] == ["0", "128"]
    assert float(torch.tensor(largest).double().sqrt().float()) == float.fromhex("0x1.b0e08ep+2")
