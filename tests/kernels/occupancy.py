"""Theoretical occupancy: how many of a multiprocessor's warps a kernel's registers, shared memory and threads allow.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 9.0, 10.0 agree on all but shared
memory). Registers are handed out to a warp in units of 256, to four partitions of 16,384 registers each; shared memory
in units of 128 bytes after 1,024 that the system keeps for each block.
"""

WARPS, BLOCKS, REGISTERS, PARTITIONS = 64, 32, 65536, 4
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of a multiprocessor


def blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once: threads per block, registers per thread, shared bytes per block."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // PARTITIONS // per_warp * PARTITIONS // warps
    by_shared = SHARED[architecture] // (-(-(shared + 1024) // 128) * 128)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


def occupancy(architecture: int, threads: int, registers: int, shared: int) -> float:
    """Resident warps over the most there can be."""
    return blocks(architecture, threads, registers, shared) * -(-threads // 32) / WARPS
