"""`pytest` alone leaves out what is marked slow (`pytest -m slow` runs it) and uses all cores, one thread each process.

`pytest -n 0` stays in one process.
"""

import os

import pytest

MOST = 8  # processes; each holds torch and some data, about a gigabyte

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    config.option.markexpr = config.option.markexpr or "not slow"
    everything = config.args_source is config.ArgsSource.TESTPATHS
    if everything and not WORKER and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = min(os.cpu_count() or 1, MOST), "loadfile"
