"""docs/kernels.md lists the kernels there are, and its occupancy follows from the architectures' limits."""

import re
from pathlib import Path

import ahead_cases
import cuda_sources
import pytest
from occupancy import blocks, occupancy

PAGE = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
STALE = "docs/kernels.md is out of date: run `make kernel-table`"


def listed(section):
    """(op, kernel) of each row, without template arguments."""
    text = PAGE.split(f"## {section}")[1].split("\n## ")[0]
    return set(re.findall(r"^\| (\w+) \| `(\w+)", text, re.MULTILINE))


def test_triton_kernels_are_listed():
    assert {kernel for _, kernel in listed("Triton")} == ahead_cases.kernels(), STALE
    assert {op for op, _ in listed("Triton")} == set(ahead_cases.declared("NOISE")), STALE


def test_cuda_kernels_are_listed():
    there = {(source.stem, name) for source in cuda_sources.SOURCES for name in cuda_sources.kernel_names(source)}
    assert listed("CUDA C++") == there, STALE


def test_the_page_names_its_compilers():
    assert re.search(r"Triton [\d.]+, its ptxas [\d.]+, its ptxas-blackwell [\d.]+, nvcc [\d.]+\.", PAGE)


@pytest.mark.parametrize(
    "architecture, threads, registers, shared, expected",
    [
        (80, 128, 32, 0, 16),  # 64 warps in blocks of 4
        (90, 128, 34, 0, 12),  # 34 registers take 1280 a warp: 12 warps a partition
        (90, 256, 255, 0, 1),  # 8192 a warp: 2 warps a partition, 8 in all
        (90, 32, 16, 0, 32),  # blocks, not warps, are the limit
        (80, 128, 32, 163 * 1024, 1),  # all that one block may have
        (80, 128, 32, 82 * 1024, 1),  # twice 82 and the system's kilobyte each: one too many
        (90, 128, 32, 113 * 1024, 2),
        (90, 512, 128, 0, 1),
    ],
)
def test_blocks(architecture, threads, registers, shared, expected):
    assert blocks(architecture, threads, registers, shared) == expected
    assert occupancy(architecture, threads, registers, shared) == expected * threads / 2048
