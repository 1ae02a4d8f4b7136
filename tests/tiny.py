"""A network small enough for tests, with every kind of block."""

from fastdiff import UNetConfig


def tiny(**options) -> UNetConfig:
    """8x8 images of one channel, two levels of one block, attention at 4x4; options change any field."""
    usual = {"resolution": 8, "in_channels": 1, "out_channels": 1, "channels": 8, "multipliers": (1, 2)}
    return UNetConfig(**(usual | {"blocks": 1, "attention": (4,), "groups": 4} | options))
