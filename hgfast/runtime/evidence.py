"""What hgfast does on a GPU beyond its portable kernels, and what speaks for it.

One table. A feature without a committed result of a run on a GPU is off; it is right as far as the
emulator, the compiler and rehearsals on a CPU can tell, and whoever wants to try it sets
``HGFAST_UNPROVEN``. The portable kernels are no feature: without them nothing would run there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

#: The environment variable that switches unproven features on: their names with commas between
#: them, or "all".
UNPROVEN = "HGFAST_UNPROVEN"


@dataclass(frozen=True)
class Feature:
    """A way to run steps on a GPU, and what says that it is right and faster there.

    Attributes:
        what: in words, for reports.
        evidence: a file of ``benchmarks/results``; None: not yet run on a GPU.
    """

    what: str
    evidence: str | None = None


FEATURES = {
    "graph": Feature('whole networks as CUDA graphs, cuda_graph="auto"'),
    "stem": Feature("the 7x7 stem in a kernel of its own"),
    "head": Feature("1x1, heatmaps and remerge behind an hourglass in one kernel"),
    "throughput": Feature("residual blocks on Hopper's warpgroup instructions (sm_90a)"),
    "latency": Feature("residual blocks of small batches over clusters (sm_90a)"),
    "branches": Feature("skip branches of small batches beside the rest, inside a CUDA graph"),
}


def asked_for() -> frozenset[str]:
    """The features that ``HGFAST_UNPROVEN`` names.

    Raises:
        ValueError: it names something that is no feature.
    """
    names = [name.strip() for name in os.environ.get(UNPROVEN, "").split(",") if name.strip()]
    unknown = [name for name in names if name not in (*FEATURES, "all")]
    if unknown:
        known = ", ".join(FEATURES)
        raise ValueError(f"{UNPROVEN} must be all, or of {known}; got {unknown[0]!r}")
    return frozenset(FEATURES if "all" in names else names)


def is_enabled(feature: str) -> bool:
    """Whether a feature of :data:`FEATURES` is used without being asked for by an argument."""
    return FEATURES[feature].evidence is not None or feature in asked_for()
