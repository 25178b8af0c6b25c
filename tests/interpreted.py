"""hgfast's Triton kernels on CPU tensors, in Triton's interpreter: a process of its own.

    with Interpreted() as interpreted:
        coords, scores = interpreted.decode(maps, "quarter", blur=11)

Triton decides when it is imported whether it compiles or interprets, so the tests' own process
cannot do both. Requests go through a pipe, pickled, strides and all.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Interpreted:
    """``decode`` and ``decode_topk`` of :mod:`hgfast.decoding.cuda`, interpreted."""

    def __enter__(self) -> Interpreted:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("decode", args, kwargs)

    def decode_topk(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("decode_topk", args, kwargs)

    def _ask(self, name: str, args: Any, kwargs: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((name, args, kwargs), self.process.stdin)
        self.process.stdin.flush()
        result, error = pickle.load(self.process.stdout)
        if error is not None:
            raise error
        return result


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    # It takes bfloat16's subnormals for numbers a little larger.
    convert = interpreter._convert_float

    def converted(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.bfloat16, tl.float32):
            return convert(data, source, target, rounding)
        return data.view(np.uint16).astype(np.uint32) << 16

    interpreter._convert_float = converted

    # Triton 3.6 makes a scalar an array of one element, from which NumPy 2.4 makes no index.
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    np.seterr(all="ignore")  # infinities are among the tests
    torch.set_num_threads(1)

    from hgfast.decoding import cuda

    while True:
        try:
            name, args, kwargs = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = getattr(cuda, name)(*args, **kwargs), None
        except ValueError as error:
            answer = None, error
        except Exception as error:  # such as the interpreter's, which no pickle takes whole
            answer = None, RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    _serve()
