"""Instructions that a thread issues for its share of the elements: the second roof of the ops that make noise.

Of the kernels that serve on CUDA (csrc/cuda), as nvcc 13.0 compiles them for sm_90: the shortest way from a thread's entry
to its exit on which the case's tensors are read and written by vectors, its noise made and its square roots taken on their
fast path (`main_path` in tests/kernels/machine_code.py). tests/kernels/test_issue_counts.py counts again.
"""

OF_A_SHARE = {  # op -> case -> (instructions, elements)
    "philox_normal": {"float32": (271, 4), "bfloat16": (457, 8)},
    "add_noise": {"float32": (360, 4)},
    "denoise_step": {  # the network's dtype, what the row has beside D
        ("float32", "no noise"): (334, 4),
        ("float32", "noise"): (547, 4),
        ("float32", "guided"): (362, 4),
        ("float32", "noise learned"): (684, 4),
        ("float32", "channels-last"): (429, 12),
        ("float32", "noise channels-last"): (1025, 12),
        ("bfloat16", "no noise"): (386, 8),
        ("bfloat16", "noise"): (791, 8),
        ("bfloat16", "guided"): (411, 8),
        ("bfloat16", "noise learned"): (1064, 8),
        ("bfloat16", "channels-last"): (457, 12),
        ("bfloat16", "noise channels-last"): (1053, 12),
    },
}


def issued(op: str, case, elements: int) -> dict:
    """What `compare` needs for the roof of issuing instructions."""
    instructions, share = OF_A_SHARE[op][case]
    return {"elements": elements, "instructions_per_element": instructions / share}
