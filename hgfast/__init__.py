"""hgfast makes heatmap pose networks fast: ``fast = hgfast.optimize(model)``."""

from hgfast import metrics, models
from hgfast._version import __version__
from hgfast._warnings import HgfastWarning
from hgfast.decoding import Flip, GlobalTopK, TopK, Transform, decode
from hgfast.optimization import OptimizationError, optimize, refresh, restore, warmup
from hgfast.reporting import Report, report
from hgfast.verification import Verification, VerificationError, verify

__all__ = [
    "Flip",
    "GlobalTopK",
    "HgfastWarning",
    "OptimizationError",
    "Report",
    "TopK",
    "Transform",
    "Verification",
    "VerificationError",
    "__version__",
    "decode",
    "metrics",
    "models",
    "optimize",
    "refresh",
    "report",
    "restore",
    "verify",
    "warmup",
]
