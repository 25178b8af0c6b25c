"""fx's tracer, more tolerant: assertions about sizes become guards, sizes that weights tell decide.

What it cannot follow faithfully, it refuses: augmented assignments are recorded as what they are,
containers that fx would replace by plain ones and autocast are errors.
"""

from __future__ import annotations

import dis
import inspect
import operator
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from hgfast.plan import Guard
from hgfast.trace.graph import TraceError
from hgfast.trace.normaliser import ARITHMETIC, AUGMENTED


class _Proxy(fx.Proxy):
    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):  # x.data += 1, which nothing would record
            raise TraceError(f"it sets the attribute {name} of an activation")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        count: int | None = self.tracer.count(self)  # type: ignore[attr-defined]
        return super().__len__() if count is None else count


def _is_asserted(frame: FrameType) -> bool:
    """Whether the truth that this frame asks for is that of an ``assert``."""
    code = list(dis.get_instructions(frame.f_code))
    here = next(i for i, step in enumerate(code) if step.offset == frame.f_lasti)
    jump = code[here]
    if not jump.opname.startswith("POP_JUMP"):  # Python 3.12 and later convert first
        here += 1
        jump = code[here]
    if "IF_TRUE" in jump.opname:  # over the error
        return code[here + 1].opname == "LOAD_ASSERTION_ERROR"
    target = next((step for step in code if step.offset == jump.argval), None)
    return (
        "IF_FALSE" in jump.opname
        and target is not None
        and (target.opname == "LOAD_ASSERTION_ERROR")
    )


_COMPARISONS = {
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


class KnownSizes:
    """What weights and permutations tell about the sizes of activations while fx still records.

    Sizes are numbers, or Guards over the sizes of the inputs; None where nothing tells.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self._modules = dict(root.named_modules(remove_duplicate=False))
        self._graph = graph
        self._known: dict[fx.Node, Any] = {}  # channels

    def evaluate(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value if isinstance(value, (int, tuple)) else None
        if value.op == "call_method" and value.target == "size":
            x, *dim = value.args
            return self._size(x, dim[0]) if dim else tuple(self._size(x, i) for i in range(4))
        if value.op != "call_function":
            return None
        if value.target is getattr and value.args[1] == "shape":
            return tuple(self._size(value.args[0], i) for i in range(4))
        arguments = [self.evaluate(argument) for argument in value.args]
        if value.target is operator.getitem and isinstance(arguments[0], tuple):
            index = value.args[1]
            return arguments[0][index] if isinstance(index, (int, slice)) else None
        function: Any = value.target
        sign = _COMPARISONS.get(function) or ARITHMETIC.get(function)
        if sign is None or len(arguments) != 2:
            return None
        if all(isinstance(item, int) for item in arguments):
            return function(*arguments)
        if all(isinstance(item, (int, Guard)) for item in arguments):
            return Guard(sign, (arguments[0], arguments[1]))
        return None

    def _channels_of_part(self, x: Any, index: int) -> Any:
        """Of what chunk() or split() returned."""
        is_chunk = isinstance(x, fx.Node) and x.target in (torch.chunk, "chunk")
        if self.count(x) is None or _argument(x, 2, "dim") != 1:
            return None
        sizes, channels = _argument(x, 1, *_PARTS), self._channels(x.args[0])
        if isinstance(sizes, (list, tuple)):
            return sizes[index]
        if not isinstance(channels, int) or index < 0:
            return None
        each = -(-channels // sizes) if is_chunk else sizes
        return min(each, channels - index * each)

    def _channels_of_slice(self, x: Any, index: tuple[Any, ...]) -> Any:
        channels = self._channels(x)
        if len(index) < 2 or not all(isinstance(item, slice) for item in index):
            return None
        ends = index[1].start, index[1].stop, index[1].step
        if not isinstance(channels, int) or any(isinstance(end, fx.Node) for end in ends):
            return None
        return len(range(channels)[index[1]])

    def count(self, x: fx.Node) -> int | None:
        """How many parts there are in what chunk(), split() or a slice of sizes returned."""
        is_chunk = x.target in (torch.chunk, "chunk")
        if is_chunk or x.target in (torch.split, "split"):
            sizes = _argument(x, 1, *_PARTS)
            if isinstance(sizes, (list, tuple)):
                return len(sizes)
            channels = self._channels(x.args[0]) if _argument(x, 2, "dim") == 1 else None
            if not isinstance(channels, int) or not isinstance(sizes, int):
                return None
            each = -(-channels // sizes) if is_chunk else sizes
            return -(-channels // each)
        if x.target is operator.getitem and isinstance(x.args[1], slice):
            whole: Any = x.args[0]
            is_sizes = whole.target == "size" and len(whole.args) == 1
            is_shape = whole.target is getattr and whole.args[1] == "shape"
            rank = self._rank(whole.args[0]) if is_sizes or is_shape else None
            return None if rank is None else len(range(rank)[x.args[1]])
        return None

    def _rank(self, x: Any) -> int | None:
        """How many dimensions an activation has, as far as one can see."""
        if x.op == "placeholder":
            return 4
        if x.op == "call_method" and x.target in ("view", "reshape"):
            is_tuple = len(x.args) == 2 and not isinstance(x.args[1], int)
            return None if is_tuple else len(x.args) - 1
        if x.op == "call_module":
            module = self._modules[str(x.target)]
            if isinstance(module, _MAPS):
                return 4
            return self._rank(x.args[0]) if _keeps_channels(module) else None
        if x.target in _CHANNELWISE:
            ranks = {self._rank(item) for item in x.args if isinstance(item, fx.Node)}
            return ranks.pop() if len(ranks) == 1 else None
        return None

    def _size(self, x: Any, dim: Any) -> Any:
        if not isinstance(x, fx.Node) or not isinstance(dim, int):
            return None
        dim %= 4
        if x.op == "placeholder":
            inputs = [node for node in self._graph.nodes if node.op == "placeholder"]
            return Guard("size", (inputs.index(x), dim))
        if x.op == "call_method" and x.target == "permute" and len(x.args) == 5:
            return self._size(x.args[0], x.args[1 + dim])
        if x.op == "call_method" and x.target in ("view", "reshape") and len(x.args) == 5:
            size = self.evaluate(x.args[1 + dim])
            return None if size == -1 else size
        return self._channels(x) if dim == 1 else None

    def _channels(self, x: Any) -> Any:
        if not isinstance(x, fx.Node):
            return None
        if x not in self._known:
            self._known[x] = self._read_channels(x)
        return self._known[x]

    def _read_channels(self, x: fx.Node) -> Any:
        if x.op == "placeholder":
            return self._size(x, 1)
        if x.op == "call_method" and x.target in ("permute", "view", "reshape"):
            return self._size(x, 1) if len(x.args) == 5 else None
        if x.op == "call_module":
            module = self._modules[str(x.target)]
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                return module.out_channels
            if isinstance(module, _BatchNorm):
                return module.num_features
            return self._channels(x.args[0]) if _keeps_channels(module) else None
        if x.target in (torch.cat, torch.concat):
            items: Any = x.args[0]
            dim = x.kwargs.get("dim", x.args[1] if len(x.args) > 1 else 0)
            parts = [self._channels(item) for item in items] if dim == 1 else [None]
            return sum(parts) if all(isinstance(part, int) for part in parts) else None
        if x.target is operator.getitem and isinstance(x.args[1], int):
            return self._channels_of_part(x.args[0], x.args[1])
        if x.target is operator.getitem and isinstance(x.args[1], tuple):
            return self._channels_of_slice(x.args[0], x.args[1])
        if x.target in _CHANNELWISE:
            known = {self._channels(item) for item in x.args if isinstance(item, fx.Node)}
            return known.pop() if len(known) == 1 else None
        return None


_PARTS = ("chunks", "split_size_or_sections", "split_size")
_MAPS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.SyncBatchNorm)


def _argument(x: fx.Node, position: int, *names: str) -> Any:
    if len(x.args) > position:
        return x.args[position]
    return next((x.kwargs[name] for name in names if name in x.kwargs), None)


def _keeps_channels(module: nn.Module) -> bool:
    kinds = (
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Sigmoid),
        *(nn.Hardsigmoid, nn.Hardswish, nn.Tanh, nn.Identity, nn.Dropout, nn.Dropout2d),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
        *(nn.GroupNorm, nn.InstanceNorm2d),
    )
    return isinstance(module, kinds)


_CHANNELWISE = frozenset(
    {
        *("relu", "relu_", "sigmoid", "add", "add_", "mul", "mul_", "contiguous"),
        *(operator.add, operator.iadd, torch.add, torch.relu, F.relu, F.relu_),
        *(operator.mul, operator.imul, torch.mul, torch.sigmoid, F.sigmoid, F.hardswish),
        *(F.max_pool2d, F.avg_pool2d, F.interpolate, F.adaptive_avg_pool2d),
    }
)


def _augmented(name: str) -> Callable[[_Proxy, Any], fx.Proxy]:
    function = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _name in AUGMENTED:
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a write to a buffer must be seen, and refused

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[Guard] = []
        self._known: KnownSizes | None = None
        self._thread = threading.get_ident()

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The truth of a comparison of sizes, where weights tell it; an assertion's is assumed."""
        truth = self._sizes().evaluate(obj.node)
        if isinstance(truth, (bool, int)):
            return bool(truth)
        frame = inspect.currentframe()  # __bool__ lies between here and the forward
        caller = frame.f_back.f_back if frame and frame.f_back else None
        if isinstance(truth, Guard) and caller is not None and _is_asserted(caller):
            self.guards.append(truth)
            return True
        raise TraceError(
            "its forward depends on the sizes or values of activations; an example input may "
            "settle it"
        )

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Of parts whose number is known; the rest is as in fx: only where it is unpacked."""
        count = self.count(obj)
        return super().iter(obj) if count is None else iter([obj[i] for i in range(count)])  # type: ignore[index]

    def count(self, obj: fx.Proxy) -> int | None:
        """How many parts it has, as far as one can know while recording."""
        return self._sizes().count(obj.node)

    def _sizes(self) -> KnownSizes:
        if self._known is None:
            self._known = KnownSizes(self.root, self.graph)
        return self._known

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:  # fx would make a plain one of it
            raise TraceError(f"it makes a {type(a).__name__} of activations")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if torch.is_autocast_enabled("cpu"):
            raise TraceError("its forward enables autocast")
        return super().create_node(*args, **kwargs)

    # fx patches nn.Module for everybody while it traces: calls of other threads pass through.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)
