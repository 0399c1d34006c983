"""What became of the tensors of a released checkpoint."""

import re
from dataclasses import dataclass, field


@dataclass
class ConversionReport:
    """What became of a release's tensors; printed as a table.

    copied: our tensor -> the official one (several, with commas between, where ours holds them all), or the encoder it
    was given with.
    dropped: official tensor -> the reason. new: our tensors that the release does not hold; no output depends on them.
    counts: values in each group.
    """

    source: str
    target: str
    copied: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.target}"]
        parts: dict[str, int] = {}
        for name in self.copied:
            part = re.match(r"(model\.vision_tower\.)?(encoder_\d+|fusion)|(model\.)?\w+", name)[0]
            parts[part] = parts.get(part, 0) + 1
        reasons: dict[str, list[str]] = {}
        for name, reason in self.dropped.items():
            reasons.setdefault(reason, []).append(name)
        shown = [f"{name}{', ...' if len(names) > 1 else ''}: {reason}" for reason, names in reasons.items()]
        groups = (
            ("copied", self.copied, [f"{part:34} {number:5}" for part, number in parts.items()]),
            ("dropped", self.dropped, shown),
            ("new", self.new, self.new),
        )
        for group, names, details in groups:
            lines.append(f"  {group:8} {len(names):6} tensors {self.counts.get(group, 0):>15,} values")
            lines += [f"    {detail}" for detail in details]
        return "\n".join(lines)
