"""import fastdiff is cheap beyond torch: kernels, data sets and the command line load when they are used."""

import os
import subprocess
import sys

PROGRAM = """
import sys, time
import torch, numpy, safetensors.torch, tqdm, PIL.Image  # what it stands on
before, start = set(sys.modules), time.process_time()
import fastdiff
seconds, new = time.process_time() - start, set(sys.modules) - before
print(seconds, *sorted({name.split(".")[0] for name in new}))
"""


def test_import():
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seconds, *packages = process.stdout.split()
    assert not {"triton", "torchvision", "typer", "matplotlib"} & set(packages), packages
    # Processor time, so that a busy machine does not count; it takes about 0.1 s.
    assert float(seconds) < 1.0
