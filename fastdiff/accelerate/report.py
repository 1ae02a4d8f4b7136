"""What `accelerate` says it did."""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Replaced:
    """A layer that a fused op serves now."""

    name: str  # qualified, as in named_modules()
    kind: str  # the op: "group_norm", "group_norm_silu", "group_norm_attention" or "conv3x3"


@dataclasses.dataclass(frozen=True)
class Left:
    """A layer that stays as it was, or less fused than it might be, and why."""

    name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was replaced and what was left, in the order of named_modules(); str() is made to be read."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]

    @property
    def counts(self) -> dict[str, int]:
        """kind -> how many."""
        return dict(collections.Counter(entry.kind for entry in self.replaced))

    def __str__(self) -> str:
        lines = ["replaced:" if self.replaced else "replaced: nothing"]
        lines += _grouped((entry.kind, entry.name) for entry in self.replaced)
        if self.left:
            lines += ["left:", *_grouped((entry.reason, entry.name) for entry in self.left)]
        return "\n".join(lines)


def _grouped(pairs) -> list[str]:
    names: dict[str, list[str]] = {}
    for group, name in pairs:
        names.setdefault(group, []).append(name or "(the module itself)")
    return [f"  {len(found):4d} x {group}: {_few(found)}" for group, found in names.items()]


def _few(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (
        f", ... {names[-1]}" if len(names) > most + 1 else "".join(f", {n}" for n in names[most:])
    )
