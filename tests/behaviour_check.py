"""What HG-8 costs beside time, in a process of its own.

python tests/behaviour_check.py eager
python tests/behaviour_check.py high

prints, as JSON, the memory that eight images of 256x256 take beyond the model's own, packed weights
included, in MB; and for a precision what the first call costs beyond the later ones, in seconds.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import nn

import hgfast
from hgfast import _native
from hgfast.models import hourglass


def megabytes(name: str) -> float:
    """A line of Linux's account of this process: VmRSS, or VmHWM, its maximum."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def seconds(model: nn.Module, batch: int) -> float:
    """The processor's time for a call: on one thread, and whatever else this machine does."""
    x = torch.randn(batch, 3, 256, 256)
    begin = time.process_time()
    with torch.inference_mode():
        model(x)
    return time.process_time() - begin


def main(mode: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = hourglass(stacks=8).eval()
    _native.load()
    with torch.inference_mode():
        nn.Conv2d(3, 3, 3)(torch.zeros(1, 3, 8, 8))  # PyTorch's own first call
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = megabytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the maximum begins anew
    result = {}
    if mode != "eager":
        hgfast.optimize(model, precision=mode, inplace=True)
        first, *later = (seconds(model, 1) for _ in range(4))
        result["first"] = first - min(later)
    seconds(model, 8)
    print(json.dumps({**result, "memory": megabytes("VmHWM") - before}))


if __name__ == "__main__":
    main(sys.argv[1])
