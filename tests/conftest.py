"""Before any test module is read: some import Triton, and whether it interprets is settled when a kernel is decorated."""

import interpreter  # noqa: F401
