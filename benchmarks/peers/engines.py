"""The candidates: each at its best setting for a given network, input and number of threads.

The engines of requirements-bench.txt are imported when they are wanted, out of build/peers, which
stands behind everything else on the path.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata, util
from typing import Any, Final

import torch
from torch import Tensor, nn

import hgfast
from benchmarks.record import ROOT

FOLDER: Final = ROOT / "build" / "peers"

Outputs = list[Tensor]  # one heatmap tensor of a stack after the other


@dataclass(frozen=True)
class Made:
    """A candidate ready to be called.

    Attributes:
        call: one inference of the whole batch; what it returns is for ``read`` alone.
        read: the result of a call as tensors.
        setting: how the engine was set up, in words.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Outputs]
    setting: str


@dataclass(frozen=True)
class Engine:
    """One candidate.

    Attributes:
        group: whom it is compared with: "float32" (results of float32's accuracy) or "bfloat16".
        make: from model (float32), input (float32) and threads.
        package: what has to be installed for it; "" for torch and hgfast.
        wrong: relative L2 error against float64 from which on the result counts as wrong.
    """

    group: str
    make: Callable[[nn.Module, Tensor, int], Made]
    package: str = ""
    wrong: float = 1e-5

    @property
    def bfloat16(self) -> bool:
        return self.group == "bfloat16"


def _tensors(result: Any) -> Outputs:
    return [tensor.float() for tensor in result]


# --- PyTorch ---


def _eager(model: nn.Module, x: Tensor, threads: int) -> Made:
    return Made(partial(model, x), _tensors, "NCHW")


def _last(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = copy.deepcopy(model).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x.to(dtype=dtype, memory_format=torch.channels_last)


def _channels_last(dtype: torch.dtype, model: nn.Module, x: Tensor, threads: int) -> Made:
    model, x = _last(model, x, dtype)
    return Made(partial(model, x), _tensors, "channels_last")


def _compiled(dtype: torch.dtype, model: nn.Module, x: Tensor, threads: int) -> Made:
    from torch._inductor import config

    # Weights become constants: its fastest setting. Not undone: what is compiled without it looks
    # like another program, which would be compiled when it is timed.
    config.freezing = True
    model, x = _last(model, x, dtype)
    run = partial(torch.compile(model, dynamic=False), x)
    run()
    return Made(run, _tensors, "inductor, freezing, channels_last")


# --- hgfast ---


def _optimized(
    precision: str, dtype: torch.dtype, model: nn.Module, x: Tensor, threads: int
) -> Made:
    fast = hgfast.optimize(copy.deepcopy(model).to(dtype), precision, inplace=True)
    x = x.to(dtype)
    with warnings.catch_warnings():
        # A region that silently ran eagerly would be timed as hgfast.
        warnings.simplefilter("error", hgfast.HgfastWarning)
        fast(x)
    report = hgfast.report(fast)
    runs = sorted({path for row in report.replaced for path in row.backend.split(" and ")})
    return Made(partial(fast, x), _tensors, " + ".join(runs))


# --- ONNX Runtime, OpenVINO ---


def _onnx(model: nn.Module, x: Tensor, threads: int) -> Made:
    onnxruntime = _imported("onnxruntime")
    _imported("onnx")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, which is old
        torch.onnx.export(model, (x,), file, dynamo=False)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: x.numpy()}
    setting = f"{options.graph_optimization_level.name.lower()}, {threads} intra-op threads"
    return Made(
        lambda: session.run(None, given),
        lambda arrays: [torch.from_numpy(array) for array in arrays],
        setting,
    )


def _converted(model: nn.Module, x: Tensor) -> Any:
    openvino = _imported("openvino")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return openvino.convert_model(model, example_input=x, input=[list(x.shape)])


def _openvino(hint: str, model: nn.Module, x: Tensor, threads: int) -> Made:
    """The whole batch in one request."""
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": hint,
    }
    compiled = _imported("openvino").Core().compile_model(_converted(model, x), "CPU", properties)
    request = compiled.create_infer_request()
    image = x.numpy()

    def read(result: Any) -> Outputs:
        return [torch.from_numpy(result[port].copy()) for port in compiled.outputs]

    return Made(
        lambda: request.infer([image], share_inputs=True, share_outputs=True),
        read,
        f"latency hint, {hint}, {threads} threads",
    )


def _openvino_streams(hint: str, model: nn.Module, x: Tensor, threads: int) -> Made:
    """Image by image, as many at a time as there are threads."""
    openvino = _imported("openvino")
    properties = {
        "PERFORMANCE_HINT": "THROUGHPUT",
        "NUM_STREAMS": threads,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": hint,
    }
    compiled = openvino.Core().compile_model(_converted(model, x[:1]), "CPU", properties)
    queue = openvino.AsyncInferQueue(compiled, threads)
    images = [image[None].numpy() for image in x]
    found: list[list[Any]] = [[] for _ in images]

    def keep(request: Any, number: int) -> None:
        found[number] = [port.data.copy() for port in request.output_tensors]

    queue.set_callback(keep)

    def call() -> list[list[Any]]:
        for number, image in enumerate(images):
            queue.start_async([image], number, share_inputs=True)
        queue.wait_all()
        return found

    def read(result: list[list[Any]]) -> Outputs:
        return [
            torch.cat([torch.from_numpy(a) for a in stack]) for stack in zip(*result, strict=True)
        ]

    return Made(call, read, f"throughput hint, {hint}, image by image in {threads} streams")


def _imported(name: str) -> Any:
    with quiet():
        return __import__(name)


@contextmanager
def quiet() -> Any:
    """Engines on the path, and their words at import not on the terminal."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))  # last: what the environment has is not replaced
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# --- All ---

f32, bf16 = torch.float32, torch.bfloat16
# What half the digits leave of a deep network of random weights: eager bfloat16 has 0.007 on HG-2.
# A wrong layout, weight or channel is off by 1.
_ROUGH: Final = 0.05

ENGINES: Final = {
    "eager": Engine("float32", _eager),
    "eager channels_last": Engine("float32", partial(_channels_last, f32)),
    "torch.compile": Engine("float32", partial(_compiled, f32)),
    "ONNX Runtime": Engine("float32", _onnx, "onnxruntime"),
    "OpenVINO": Engine("float32", partial(_openvino, "f32"), "openvino"),
    "hgfast highest": Engine("float32", partial(_optimized, "highest", f32)),
    "hgfast high": Engine("float32", partial(_optimized, "high", f32), wrong=2e-5),
    "eager bfloat16": Engine("bfloat16", partial(_channels_last, bf16), wrong=_ROUGH),
    "torch.compile bfloat16": Engine("bfloat16", partial(_compiled, bf16), wrong=_ROUGH),
    "OpenVINO bfloat16": Engine("bfloat16", partial(_openvino, "bf16"), "openvino", _ROUGH),
    "hgfast medium": Engine("bfloat16", partial(_optimized, "medium", f32), wrong=_ROUGH),
    "hgfast bfloat16": Engine("bfloat16", partial(_optimized, "medium", bf16), wrong=_ROUGH),
}
#: Another way to run a candidate on a batch; the faster of the two is measured under its name.
ALTERNATIVES: Final = {
    "OpenVINO": partial(_openvino_streams, "f32"),
    "OpenVINO bfloat16": partial(_openvino_streams, "bf16"),
}


def is_ours(name: str) -> bool:
    return name.startswith("hgfast")


def missing(names: list[str]) -> list[str]:
    """Packages that these candidates need and that are not installed."""
    wanted = dict.fromkeys(ENGINES[name].package for name in names)
    with quiet():
        return [package for package in wanted if package and util.find_spec(package) is None]


def versions(names: list[str]) -> dict[str, str]:
    """Of the packages that these candidates need."""
    wanted = dict.fromkeys(ENGINES[name].package for name in names)
    with quiet():
        return {package: metadata.version(package) for package in wanted if package}
