"""In-tree PEP 517 backend: setuptools, building against the torch that the environment already has.

pip builds in an isolated environment. A torch listed as a build requirement would be unpacked there a second time,
gigabytes with its CUDA packages, though the environment that asked has one. So: look for torch in that environment's
own site-packages, let the build see it, and require it only where it is absent.
"""

import importlib.util
import os
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no torch)

TORCH = "torch>=2.11"


def site_packages() -> list[str]:
    """site-packages of the interpreter that runs pip: isolation changes sys.path, not the paths of sysconfig."""
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def torch_requirement() -> list[str]:
    """[] where torch is importable from here, made so if need be, or nothing is to be compiled; else [TORCH]."""
    if os.environ.get("FASTDIFF_BUILD") == "none" or importlib.util.find_spec("torch"):
        return []
    for path in site_packages():
        if os.path.isdir(os.path.join(path, "torch", "include")):
            sys.path.append(path)
            return []
    return [TORCH]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    torch_requirement()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    torch_requirement()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
