"""What ptxas made: registers, memory and SASS of each kernel in a cubin, fatbin or shared library, by cuobjdump."""

import heapq
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

ACCESSES = {"loads": ("LDG", "LDGSTS"), "stores": ("STG",)}  # of global memory; LDGSTS copies on to shared memory


def cuobjdump() -> str | None:
    """Triton's own, else the toolkit's."""
    triton = importlib.util.find_spec("triton")
    own = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    return str(own) if own and own.exists() else shutil.which("cuobjdump")


def examine(path) -> list[dict]:
    """One record a kernel: function (mangled), architecture, reg, stack, local, shared, sass: ["01c0 LDG.E.64 ..."]."""
    tool = cuobjdump()
    text = subprocess.run([tool, "-sass", "-res-usage", path], capture_output=True, text=True, check=True).stdout
    usage, code, architecture = {}, {}, 0
    for section in re.split(r"\n(?=\s*(?:Fatbin elf code|Function|\s*code for sm_))", text):
        head = section.strip().split("\n", 1)[0]
        if found := re.search(r"(?:arch = |code for )sm_(\d+)", section.split("Function")[0]):
            architecture = int(found[1])
        if found := re.match(r"Function : (\S+)", head):
            lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", section)
            code[architecture, found[1]] = [f"{at} {instruction}" for at, instruction in lines]
        elif found := re.match(r"Function (\S+):", head):
            usage.setdefault(found[1], []).append(
                {key.lower(): int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", section)}
            )
    records = []
    for (architecture, function), sass in code.items():
        records.append({"function": function, "architecture": architecture, "sass": sass} | usage[function].pop(0))
    return records


def operations(sass: list[str]) -> list[str]:
    """The opcodes with their suffixes, without addresses, predicates and operands."""
    return [re.sub(r"^\S+ (@!?U?P\w+ )?", "", line).split()[0] for line in sass]


def spills(sass: list[str]) -> int:
    """Stores to and loads from local memory."""
    return sum(re.match(r"(STL|LDL)\b", op) is not None for op in operations(sass))


def contractions(sass: list[str]) -> int:
    """Fused multiply-adds beyond those of correctly rounded square roots and quotients.

    sqrt.rn.f32 is MUFU.RSQ and two FFMA that refine it, in line for each root; one routine of three FFMA and its own
    MUFU.RSQ, shared by all of them, serves operands at the ends of the range. div.rn.f32 likewise is MUFU.RCP and five
    FFMA, and ten in its routine, which rounds in three directions.
    """
    ops = operations(sass)
    roots, quotients, fused = ops.count("MUFU.RSQ"), refined_reciprocals(sass), sum(op.startswith("FFMA") for op in ops)
    return fused - (2 * (roots - 1) + 3 if roots else 0) - (5 * (quotients - 1) + 10 if quotients else 0)


def refined_reciprocals(sass: list[str]) -> int:
    """The MUFU.RCP whose error a FFMA, 1 - b r, takes next: one for each div.rn.f32 and one in their routine."""
    estimates, found = set(), 0
    for line in sass:
        if estimate := re.search(r"MUFU\.RCP (R\d+),", line):
            estimates.add(estimate[1])
        elif (residual := re.search(r"FFMA R\d+, -?(R\d+)\S*, (R\d+)\S*, 1$", line)) and estimates & set(residual.groups()):
            estimates -= set(residual.groups())
            found += 1
    return found


def main_loops(sass: list[str], word: str) -> list[str]:
    """The "loads" or "stores" of global memory inside loops; all of the kernel's where no loop has any."""
    inside = set()
    for line in sass:
        at = int(line.split()[0], 16)
        if (found := re.search(r"\bBRA(?:\.\S+)? .*?0x([0-9a-f]+)$", line)) and (to := int(found[1], 16)) < at:
            inside.update(range(to, at + 1))
    everywhere, looped = [], []
    for line, op in zip(sass, operations(sass), strict=True):
        if op.split(".")[0] in ACCESSES[word]:
            everywhere.append(op)
            if int(line.split()[0], 16) in inside:
                looped.append(op)
    return looped or everywhere


def is_wide(sass: list[str], word: str) -> bool:
    """Whether the main loops' "loads" or "stores" of global memory include 128-bit ones."""
    return any("128" in op.split(".") for op in main_loops(sass, word))


def makes_noise(sass: list[str]) -> bool:
    """Whether a Philox multiplier (D2511F53, which is -2DAEE0AD) is an operand."""
    return any(re.search(r"-0x2daee0ad|0xd2511f53", line) for line in sass)


def _blocks(sass: list[str]):
    """Basic blocks [(first, end, successors)] by index of instruction; a call counts as one instruction."""
    index = {int(line.split()[0], 16): i for i, line in enumerate(sass)}
    ends = {}
    for i, (line, op) in enumerate(zip(sass, operations(sass), strict=True)):
        conditional = re.match(r"\S+ @|\S+ BRA(?:\.\S+)? !?U?P\d", line) is not None
        if op.split(".")[0] == "BRA":
            ends[i] = [index[int(line.rsplit("0x", 1)[1], 16)]] + [i + 1] * conditional
        elif op.split(".")[0] in ("EXIT", "RET"):
            ends[i] = [len(sass)] + [i + 1] * conditional
    starts = sorted({0, *(i + 1 for i in ends), *(to for targets in ends.values() for to in targets)} - {len(sass)})
    for first, end in zip(starts, [*starts[1:], len(sass)], strict=True):
        yield first, end, ends.get(end - 1, [end])


def _late(op: str) -> bool:
    """Whether an operation must follow griddepcontrol.wait: it accesses global memory, or is launch_dependents."""
    name = op.split(".")[0]
    return name in ("PREEXIT", "LD", "ST", "RED", "ATOM") or name.startswith(("LDG", "STG", "REDG", "ATOMG", "UTMA", "UBLK"))


def unguarded(sass: list[str]) -> list[str]:
    """What must not, and on some way through a kernel does, come before ACQBULK, which is griddepcontrol.wait.

    Ends count, and jumps to an address in a register. The routine that is called is gone through, and so is what follows.
    """
    index, ops = {int(line.split()[0], 16): i for i, line in enumerate(sass)}, operations(sass)
    found, known, ways = set(), set(), [0]
    while ways:
        i = ways.pop()
        if i in known:
            continue
        known.add(i)
        line, name = sass[i], ops[i].split(".")[0]
        conditional = "@" in line or (name == "BRA" and "," in line)
        if name == "ACQBULK" and not conditional:
            continue
        to = re.search(r" 0x([0-9a-f]+)$", line) if name in ("BRA", "CALL") else None
        if name == "EXIT" or _late(ops[i]) or (name in ("BRA", "CALL", "BRX", "BRXU", "JMP", "JMX") and not to):
            found.add(line)
        if to:
            ways.append(index[int(to[1], 16)])
        if conditional or name not in ("BRA", "EXIT", "RET"):
            ways.append(i + 1)
    return sorted(found)


def main_path(sass: list[str], passed: dict[str, int]) -> int:
    """Instructions on the shortest way through a kernel that passes exactly so many that match each pattern."""
    blocks, patterns = {}, list(passed)
    for first, end, after in _blocks(sass):
        found = tuple(sum(re.search(p, line) is not None for line in sass[first:end]) for p in patterns)
        blocks[first] = end - first, found, after
    wanted = tuple(passed.values())
    ways, known = [(0, 0, (0,) * len(wanted))], set()
    while ways:
        length, at, have = heapq.heappop(ways)
        if at == len(sass):
            if have == wanted:
                return length
            continue
        if (at, have) in known:
            continue
        known.add((at, have))
        size, found, after = blocks[at]
        have = tuple(h + f for h, f in zip(have, found, strict=True))
        for to in after if all(h <= w for h, w in zip(have, wanted, strict=True)) else ():
            heapq.heappush(ways, (length + size, to, have))
    raise ValueError(f"no way through the kernel passes {passed}")
