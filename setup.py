"""Packages and the native extension; pyproject.toml holds everything that is not code.

FASTDIFF_BUILD=auto (default: CUDA kernels too where nvcc fits torch) | cpu | cuda | none (plain torch, nothing compiled).
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent / "build_support"))
import native


def native_code() -> dict:
    choice = native.build_choice()
    if choice == "none":
        return {}
    native.require_compiler()
    extension = native.extension(choice)  # sets CUDA_HOME, which torch's module reads when it is imported
    from torch.utils.cpp_extension import BuildExtension, is_ninja_available

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=is_ninja_available())},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# Metadata and sdist need neither torch nor a compiler.
COMPILES = {"build_ext", "build", "install", "develop", "bdist_wheel", "editable_wheel"}

setup(
    packages=[*find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    # kernels/ itself is no package: it would shadow other packages of that name from the repository's root.
    package_dir={"fastdiff": "fastdiff", "fastdiff.kernels": "kernels/triton"},
    package_data={"fastdiff": ["assets/*", "assets/classifiers/*", "py.typed"]},
    **(native_code() if COMPILES.intersection(sys.argv) else {}),
)
