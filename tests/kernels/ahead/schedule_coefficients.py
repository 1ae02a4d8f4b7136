"""schedule_coefficients: every law and every target with its slopes, which is all the code, and once without."""

import torch

from fastdiff.kernels.schedule_coefficients import schedule_coefficients
from fastdiff.ops.schedule_coefficients import Law, Target

ARCHITECTURES = (90,)  # float64 arithmetic that no architecture treats specially
NOISE = False
NARROW = {
    "_schedule_coefficients loads": "one time a sample",
    "_schedule_coefficients stores": "seven coefficients a sample, side by side",
}


def cases(case):
    t, table = torch.empty(64), torch.empty(1000, dtype=torch.float64)
    pairs = [(law, Target.EDM) for law in Law] + [
        (Law.VP, target) for target in Target if target not in (Target.EDM, Target.FLOW)
    ]
    pairs += [(Law.FLOW, Target.FLOW)]
    for law, target, slopes in [(*pair, True) for pair in pairs] + [(Law.TABLE, Target.EDM, False)]:
        case(f"{law.name} {target.name}{' slopes' if slopes else ''}")
        numbers = (0.5, 20.0, 0.5, 0.002, 999.0, False, slopes)
        dtype = torch.float64 if slopes else torch.float32
        schedule_coefficients(t, table if law == Law.TABLE else None, int(law), int(target), *numbers, dtype)
