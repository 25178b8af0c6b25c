"""What was replaced, what was left, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from hgfast._table import render
from hgfast.optimization import Skipped, decode_of, optimization_of
from hgfast.region import regions_of


@dataclass(frozen=True)
class Replaced:
    """A recognised block: its qualified name, what it is, what runs it, the region it is in."""

    name: str
    kind: str
    backend: str
    region: str


@dataclass(frozen=True)
class Report:
    """What :func:`hgfast.optimize` did to a model. Prints as a table.

    Attributes:
        replaced: one row per recognised block.
        skipped: modules that are no region of their own, and why.
        fallbacks: reasons for which eager ran instead since then: (region, reason).
        precision: the precision optimised for, None for a model that was not optimised.
        decode: the method by which the model decodes its heatmaps; None where it returns them.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    fallbacks: list[tuple[str, str]] = field(default_factory=list)
    precision: str | None = None
    decode: str | None = None

    def __str__(self) -> str:
        if self.precision is None:
            return "hgfast: this model is not optimised"
        rows = [[_shown(r.name), r.kind, r.backend, _shown(r.region)] for r in self.replaced]
        regions = len({row.region for row in self.replaced})
        parts = [
            render(
                f"hgfast: {len(rows)} blocks replaced in {regions} region{'s' * (regions != 1)}, "
                f'precision "{self.precision}"'
                + (f', heatmaps decoded by "{self.decode}"' if self.decode else ""),
                ["block", "kind", "backend", "region"],
                rows,
            )
        ]
        if self.skipped:
            skipped = [[_shown(row.name), row.reason] for row in self.skipped]
            parts.append(render("left as they are", ["module", "because"], skipped))
        if self.fallbacks:
            fallbacks = [[_shown(name), reason] for name, reason in self.fallbacks]
            parts.append(render("ran eagerly since", ["region", "because"], fallbacks))
        return "\n".join(parts)


def _shown(name: str) -> str:
    return name or "(the model)"


def report(fast: nn.Module) -> Report:
    """What :func:`hgfast.optimize` replaced in ``fast``, what it left, and why.

    Backends are those of this moment: a model that was moved or cast since is described as it
    is now. For a model that was never optimised the report is empty and says so.
    """
    optimization = optimization_of(fast)
    if optimization is None:
        return Report()
    decoding = decode_of(fast)
    replaced = []
    for region in regions_of(fast):
        prefix = f"{region.name}." if region.name else ""
        replaced += [
            Replaced(f"{prefix}{step.name}".rstrip("."), step.title, path, region.name)
            for step, path in region.paths()
            if step.kind not in ("max_pool", "add")
        ]
    return Report(
        replaced=replaced,
        skipped=list(optimization.skipped),
        fallbacks=[(name, reason) for reason, name in optimization.notices.seen.items()],
        precision=optimization.precision,
        decode=decoding["method"] if decoding else None,
    )
