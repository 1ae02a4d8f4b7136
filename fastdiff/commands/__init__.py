"""What the subcommands of `fastdiff` do, apart from reading their options."""

from fastdiff.samplers.rk45 import TooManyEvaluations
from fastdiff.training.trainer import TrainingError

# Errors that a better request avoids: shown as one line. All others are bugs and keep their traceback.
REQUEST_ERRORS = (
    ValueError,
    TypeError,
    FileNotFoundError,
    PermissionError,
    FloatingPointError,
    TrainingError,
    TooManyEvaluations,
)
