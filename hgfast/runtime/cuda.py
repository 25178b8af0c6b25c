"""The CUDA executor: a Plan as a sequence of launches on the current stream.

Residual blocks and joins run in hgfast's kernels, in bfloat16 or float16 with float32 sums; so do
the stem and the heads where that is switched on (:mod:`hgfast.runtime.evidence`). The other
convolutions run in cuDNN, their BatchNorms folded. Values are channels_last throughout. Nothing
waits for the device, so a run may stand in a CUDA graph capture; there, where that is switched on,
skip branches of small batches run beside the rest (:mod:`hgfast.runtime.branches`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hgfast import _native
from hgfast.plan import (
    Bottleneck,
    Conv,
    Convolution,
    Plan,
    Remerge,
    Step,
    UpsampleAdd,
    output_values,
)
from hgfast.runtime import blocks, branches, evidence, fusions, plain, subtrees
from hgfast.runtime.blocks import Block
from hgfast.runtime.folding import bottleneck_weights, conv_weights, remerge_weights
from hgfast.runtime.lanes import CudaStreams, Lanes, Streams
from hgfast.runtime.subtrees import Subtree

Values = dict[int, Tensor]


@dataclass(frozen=True)
class _Launch:
    """A step, or several, with their weights bound.

    Attributes:
        run: enqueues it and returns the first of the values it gives; puts others in itself.
        work: what it reads and gives.
        upper: of a block, likewise without the lower branch that it adds; None if it adds none.
        dead: the values that nobody reads any more behind it, where all launches are in a row.
    """

    run: Callable[[Values], Tensor]
    work: branches.Launch
    upper: Callable[[Values], Tensor] | None = None
    dead: tuple[int, ...] = ()


class Kernels:
    """The kernels that an executor launches: a GPU's, or the emulated ones in tests.

    Args:
        native: the module with ``CudaBottleneck``, ``CudaStem`` and ``CudaHead``.
        ops: the namespace of the public ops.
        device: where they run.
    """

    def __init__(self, native: Any, ops: Any, device: torch.device) -> None:
        self.bottleneck = native.CudaBottleneck
        self.stem = native.CudaStem
        self.head = native.CudaHead
        # Of one architecture; a build for others does not have them.
        self.special = {
            "throughput": getattr(native, "CudaHopperBottleneck", None),
            "latency": getattr(native, "CudaLatencyBottleneck", None),
        }
        self.subtree = getattr(native, "CudaLatencySubtree", None)
        self.ops = ops
        self.device = device
        # For branches that run beside each other; there are none on a CPU.
        self.streams: Streams | None = CudaStreams(device) if device.type == "cuda" else None

    def block(self, element: torch.dtype, weights: Sequence[Tensor | None], relu: bool) -> Block:
        """A residual block's kernels with its weights packed."""
        w1, w3, project = weights[2], weights[6], weights[8] is not None
        assert w1 is not None
        assert w3 is not None
        channels = (w1.shape[1], w1.shape[0], w3.shape[0])

        def pack(kernel: Any) -> Callable[[], Any]:
            return lambda: kernel(element, *weights, relu=relu)

        others = {
            name: pack(kernel)
            for name, kernel in blocks.enabled(self.special).items()
            if not kernel.obstacle(self.device, *channels, project)
        }
        return Block(pack(self.bottleneck), others)

    def takes_head(self, head: fusions.Head) -> bool:
        """Whether a kernel takes what follows an hourglass as one."""
        return not self.head.obstacle(self.device, *head.channels)

    def obstacle(self, step: Step, channels: int | None = None) -> str | None:
        """Why no kernel takes this step, in words; None if one does, or cuDNN runs it.

        ``channels`` are those of the step's output, where known.
        """
        if isinstance(step, Bottleneck):
            in_, middle = step.convs[0].channels
            out, project = step.convs[2].channels[1], step.project is not None
            reason: str = self.bottleneck.obstacle(self.device, in_, middle, out, project)
            return reason or None
        if isinstance(step, UpsampleAdd) and (step.factors != (2,) or step.relu):
            return "it joins several maps"
        if isinstance(step, UpsampleAdd) and channels is not None and channels % 8:
            return f"its {channels} channels are no multiple of 8"
        return None


def kernels_of(device: torch.device) -> Kernels | str:
    """The kernels for a GPU, or why there are none."""
    native = _native.load()
    if native is None:
        return str(_native.reason)
    if not hasattr(native, "CudaBottleneck"):
        state = native.build_info()["cuda"] or "switched off by USE_CUDA=0"
        return f"hgfast was installed without CUDA kernels ({state})"
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        return f"{properties.name} is older than compute capability 8.0"
    obstacle = native.cuda_obstacle(device)
    if obstacle:
        archs = native.build_info()["cuda_archs"]
        return f"hgfast was built for {archs}, which {properties.name} does not run ({obstacle})"
    return Kernels(native, torch.ops.hgfast, device)


def element_of(dtype: torch.dtype, precision: str) -> torch.dtype | None:
    """The dtype that activations are kept in; None where no kernel is that precise."""
    if dtype in (torch.bfloat16, torch.float16):
        return dtype
    return torch.bfloat16 if dtype == torch.float32 and precision == "medium" else None


def unsupported(
    plan: Plan, dtype: torch.dtype, precision: str, kernels: Kernels | str
) -> str | None:
    """Why this executor cannot run the plan, in words; None if it can."""
    if isinstance(kernels, str):
        return kernels
    if element_of(dtype, precision) is None:
        if dtype == torch.float32:
            return (
                f'the CUDA kernels compute in bfloat16 or float16, which is not the "{precision}" '
                'precision of a float32 model; precision="medium" is'
            )
        return f"its weights are {dtype}; the CUDA kernels take float32, bfloat16 and float16"
    channels = channels_of(plan)
    reasons = [
        kernels.obstacle(step, channels.get(step.output))
        for step in plan.steps
        if isinstance(step, (Bottleneck, UpsampleAdd))
    ]
    # A few steps without a kernel run eagerly among the others; with none, there is no gain.
    return reasons[0] if reasons and all(reasons) else None


def channels_of(plan: Plan) -> dict[int, int]:
    """Each value's channels, as far as the convolutions on the way tell."""
    known: dict[int, int] = {}
    for step in plan.steps:
        parts = [part for part in step.parts if isinstance(part, Convolution)]
        if parts:
            known.setdefault(step.inputs[0], parts[0].channels[0])
            last = step.convs[2] if isinstance(step, Bottleneck) else parts[-1]
            known[step.output] = last.channels[1]
    for step in plan.steps:  # the others keep the number
        same = (*step.inputs, step.output)
        found = next((known[number] for number in same if number in known), None)
        if not step.parts and found is not None:
            known.update(dict.fromkeys(same, found))
    return known


class CudaExecutor:
    """A Plan bound to one state of its weights. Immutable, safe to call from several threads."""

    asynchronous = True
    features: frozenset[str]

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        precision: str,
        kernels: Kernels,
        as_computed: bool = False,
    ) -> None:
        first = next(iter(weights.values()))
        element = element_of(first.dtype, precision)
        if element is None:
            raise ValueError(unsupported(plan, first.dtype, precision, kernels))
        self._plan = plan
        self.dtype = self._element = element
        self._kernels = kernels
        self._as_computed = as_computed
        self._outputs = list(dict.fromkeys(output_values(plan.outputs)))
        self._channels = channels_of(plan)
        self._stems = {
            step.output
            for step in plan.steps
            if evidence.is_enabled("stem") and fusions.is_stem(step)
        }
        heads = (
            fusions.heads(plan.steps, plan.inputs, self._outputs, kernels.takes_head)
            if evidence.is_enabled("head")
            else []
        )
        self._heads = {step.output: head for head in heads for step in head.steps}
        # A stem reads the caller's tensor as it is: what only stems read is not converted.
        others = {n for step in plan.steps if step.output not in self._stems for n in step.inputs}
        self._raw = set(plan.inputs) - others - set(self._outputs)
        # For shapes of inputs that were seen to fit.
        self._fitting: dict[tuple[torch.Size, ...], list[_Launch]] = {}
        self._weights: list[Tensor] = []  # what was packed
        self._blocks: dict[int, Block] = {}  # by the value that they give
        with torch.inference_mode():
            self._launches = self._arrange(plan.steps, weights)
        used = {name for block in self._blocks.values() for name in block.names} - {"portable"}
        used |= {"stem"} if self._stems else set()
        used |= {"head"} if self._heads else set()
        self._lanes = self._prepare_lanes() if evidence.is_enabled("branches") else None
        used |= {"branches"} if self._lanes else set()
        self.features = frozenset(used)
        self._streams: set[int] = set()  # that have run it
        if kernels.device.type == "cuda":
            # Other threads will run this on streams of theirs, with no event to wait for.
            torch.cuda.current_stream(kernels.device).synchronize()
        self._name = str(element).removeprefix("torch.")
        self.backend = f"cuda {self._name}"

    def run(self, inputs: Sequence[Tensor]) -> Values:
        """Run on inputs (B, C, H, W); returns the Plan's outputs by value number.

        Raises:
            ValueError: a step cannot take what reaches it; the message names the step.
        """
        shapes = tuple(x.shape for x in inputs)
        launches = self._fitting.get(shapes)
        if launches is None:
            launches = self._launches_of(self._plan.shapes(*shapes))  # raises where none fit
            if len(self._fitting) < 64:
                self._fitting[shapes] = launches
        dtype, layout = inputs[0].dtype, torch.channels_last
        if inputs[0].is_contiguous():
            layout = torch.contiguous_format
        self.use_stream()
        values: Values = {}
        with torch.no_grad():
            for number, x in zip(self._plan.inputs, inputs, strict=True):
                if number not in self._raw:
                    x = x.to(self._element, memory_format=torch.channels_last)
                values[number] = x
            lanes = self._lanes
            if lanes is None or not self._run_in_lanes(lanes, launches, values, shapes):
                for launch in launches:
                    values[launch.work.gives[0]] = launch.run(values)
                    for number in launch.dead:
                        del values[number]
            if self._as_computed:
                return {number: values[number] for number in self._outputs}
            return {n: plain.converted(values[n], dtype, layout) for n in self._outputs}

    def _prepare_lanes(self) -> Lanes | None:
        """Streams for the branches that may ever run beside the rest; None if there are none."""
        works = [launch.work for launch in self._launches]
        count = branches.lanes(branches.schedule(works, self._outputs, lambda _: True))
        if count == 1 or self._kernels.streams is None:
            return None
        # The joins' kernel is loaded now: a capture may be the first to launch it.
        low, skip = (
            torch.zeros(1, 8, n, n, dtype=self._element, device=self._kernels.device)
            for n in (1, 2)
        )
        self._kernels.ops.upsample_add(low, skip)
        return Lanes(self._kernels.streams, count)

    def _run_in_lanes(
        self,
        lanes: Lanes,
        launches: Sequence[_Launch],
        values: Values,
        shapes: tuple[torch.Size, ...],
    ) -> bool:
        """Run with branches beside each other, if this is the place and there are any."""
        with lanes.free() as is_free:
            if not is_free:
                return False
            all_shapes = self._plan.shapes(*shapes)

            def is_little(work: branches.Launch) -> bool:
                batch, _, height, width = all_shapes[work.gives[0]]
                return blocks.runs_beside(batch, height, width)

            works = [launch.work for launch in launches]
            turns = branches.schedule(works, self._outputs, is_little)
            if branches.lanes(turns) == 1:
                return False

            def enqueue(turn: branches.Turn) -> None:
                launch = launches[turn.index]
                if turn.part == "join":
                    result = self._kernels.ops.upsample_add(*(values[n] for n in turn.reads))
                elif turn.part == "upper":
                    assert launch.upper is not None
                    result = launch.upper(values)
                else:
                    result = launch.run(values)
                values[turn.gives[0]] = result
                for number in turn.dead:
                    del values[number]

            lanes.run(turns, enqueue)
            return True

    def _obstacle(self, step: Step) -> str | None:
        return self._kernels.obstacle(step, self._channels.get(step.output))

    def use_stream(self) -> None:
        """The current stream reads the packed weights: once they are dropped, their memory waits.

        A graph that was captured from a run needs this for each stream that it is replayed on.
        """
        if self._kernels.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._kernels.device)
        if stream.cuda_stream not in self._streams and not torch.cuda.is_current_stream_capturing():
            for tensor in self._weights:
                tensor.record_stream(stream)
            self._streams.add(stream.cuda_stream)

    def path(self, step: Step) -> str:
        """What runs one step."""
        if step.output in self._stems:
            return f"{self.backend} stem"
        if step.output in self._heads:
            return f"{self.backend} head"
        reason = self._obstacle(step)
        if reason:
            return f"eager: {reason}"
        if isinstance(step, (Conv, Remerge)):
            return f"cuDNN {self._name}"
        block = self._blocks.get(step.output)
        # Which one, the shape decides.
        several = f", {' or '.join(block.names)}" if block and len(block.names) > 1 else ""
        return self.backend + several

    def _arrange(self, steps: Sequence[Step], weights: Mapping[str, Tensor]) -> list[_Launch]:
        """The launches in order.

        A pooling whose result only one block reads becomes that block's prologue.
        """
        pools = fusions.pooled_blocks(steps, self._outputs, lambda s: not self._obstacle(s))

        arranged: list[_Launch] = []
        begins: list[Step] = []
        for step in steps:
            if step.output in pools:
                continue
            head = self._heads.get(step.output)
            if head is None:
                arranged.append(self._launch(step, weights, pools))
            elif step is head.features:
                arranged.append(self._launch_head(head, weights))
            else:
                continue
            begins.append(step)
        self._subtrees = self._bind_subtrees(begins, steps, pools)
        return self._with_dead(arranged)

    def _with_dead(self, launches: Sequence[_Launch]) -> list[_Launch]:
        """The launches, with what each may drop behind it."""
        kept, result = set(self._outputs), []
        for launch in reversed(launches):
            reads = dict.fromkeys(launch.work.reads)
            result.append(replace(launch, dead=tuple(n for n in reads if n not in kept)))
            kept.update(reads)
        return result[::-1]

    def _bind_subtrees(
        self, steps: Sequence[Step], every: Sequence[Step], pools: Mapping[int, int]
    ) -> list[tuple[int, Subtree, _Launch]]:
        """The chains of blocks that may be one launch, by the number of their first launch."""
        kernel = self._kernels.subtree
        if kernel is None or not evidence.is_enabled("latency"):
            return []

        def fits(step: Bottleneck) -> bool:
            block = self._blocks.get(step.output)
            return block is not None and "latency" in block.names and step.project is None

        bound = []
        for subtree in subtrees.find(steps, every, pools, self._outputs, fits):
            blocks_ = [self._blocks[step.output].kernel("latency") for step in subtree.steps]
            links = [(link.source, link.pool, link.low) for link in subtree.links]
            try:
                packed = kernel(blocks_, links)
            except ValueError:  # the blocks differ in their channels, or their maps are too large
                continue
            work = branches.Launch((subtree.output,), (subtree.reads,))
            launch = _Launch(_one_launch(packed, subtree.reads), work)
            bound.append((steps.index(subtree.steps[0]), subtree, launch))
        return bound

    def _launches_of(self, shapes: Mapping[int, tuple[int, ...]]) -> list[_Launch]:
        """The launches for values of these shapes: what is small enough, as one."""
        result: list[_Launch] = []
        begin = 0
        for first, subtree, launch in self._subtrees:
            batch, _, height, width = shapes[subtree.steps[0].output]
            if first >= begin and subtree.fits(batch, height, width):
                result += [*self._launches[begin:first], launch]
                begin = first + len(subtree.steps)
        return self._with_dead([*result, *self._launches[begin:]]) if begin else self._launches

    def _launch(
        self, step: Step, weights: Mapping[str, Tensor], pools: Mapping[int, int]
    ) -> _Launch:
        """One step with its weights bound."""
        if isinstance(step, Bottleneck) and not self._obstacle(step):
            return self._launch_block(step, weights, pools)
        run = self._bind(step, weights)
        return _Launch(run, branches.Launch((step.output,), step.inputs))

    def _bind(self, step: Step, weights: Mapping[str, Tensor]) -> Callable[[Values], Tensor]:
        """One step other than a block that a kernel takes, with its weights bound."""
        ops, x = self._kernels.ops, step.inputs[0]
        other = step.inputs[1] if len(step.inputs) > 1 else None
        if self._obstacle(step) or not _has_launch(step):
            run, held = plain.bind(step, weights, self._element)
            self._weights += held
            return lambda v: run(*(v[number] for number in step.inputs))
        if step.output in self._stems:
            assert isinstance(step, Conv)
            stem = self._kernels.stem(self._element, *conv_weights(step, weights)[:2])
            self._weights += stem.tensors()
            return lambda v: stem.run(v[x])
        if isinstance(step, Conv):
            weight, bias, scale, shift = conv_weights(step, weights)
            weight = weight.to(self._element, memory_format=torch.channels_last)
            bias = bias.to(self._element)
            self._weights += [t for t in (weight, bias, scale, shift) if t is not None]
            stride, padding, relu = step.conv.stride, step.conv.padding, step.relu
            return lambda v: ops.conv(
                v[x],
                weight,
                bias,
                scale,
                shift,
                stride,
                padding,
                relu,
                None if other is None else v[other],
            )
        if isinstance(step, Remerge):
            weight, bias = remerge_weights(step, weights)
            weight, bias = weight.to(self._element), bias.to(self._element)
            self._weights += [weight, bias]
            return lambda v: ops.conv(v[x], weight, bias, add=None if other is None else v[other])
        return lambda v: ops.upsample_add(*(v[number] for number in step.inputs))

    def _launch_block(
        self, step: Bottleneck, weights: Mapping[str, Tensor], pools: Mapping[int, int]
    ) -> _Launch:
        """A residual block with its weights bound.

        Where a block behind it pools its result, and the kernel that runs gives the maximum beside
        the result, the launch puts that into the values itself, and the other takes it from there.
        """
        block = self._kernels.block(
            self._element, bottleneck_weights(step, weights), relu=not step.preactivated
        )
        self._weights += block.tensors()
        self._blocks[step.output] = block
        x = step.inputs[0]
        other = step.inputs[1] if len(step.inputs) > 1 else None
        source = pools.get(x, x)
        maximum = next((pool for pool, of in pools.items() if of == step.output), None)

        def launch(values: Values, low: int | None = other) -> Tensor:
            ready = values.pop(x, None) if x in pools else None
            result, most = block.run(
                values[source] if ready is None else ready,
                None if low is None else values[low],
                x in pools and ready is None,
                maximum is not None,
            )
            if maximum is not None and most is not None:
                values[maximum] = most
            return result

        # A maximum passes from launch to launch besides what they read and give: both stay on
        # lane 0, and a maximum of the sum is the whole block's.
        work = branches.Launch(
            gives=(step.output,),
            reads=(source,) if other is None else (source, other),
            low=other if maximum is None and step.convs[2].channels[1] % 8 == 0 else None,
            movable=x not in pools,
        )
        return _Launch(launch, work, lambda values: launch(values, None))

    def _launch_head(self, head: fusions.Head, weights: Mapping[str, Tensor]) -> _Launch:
        """A head with its weights bound.

        Where it gives two, its launch puts the heatmaps into the values itself.
        """
        heatmaps, merge = head.heatmaps, head.merge
        none = (None, None)
        kernel = self._kernels.head(
            self._element,
            *conv_weights(head.features, weights)[:2],
            *(conv_weights(heatmaps, weights)[:2] if heatmaps else none),
            *(remerge_weights(merge, weights) if merge else none),
        )
        self._weights += kernel.tensors()
        y, *others = head.reads

        def launch(values: Values) -> Tensor:
            maps, following = kernel.run(values[y], *(values[x] for x in others))
            if merge is None:
                result: Tensor = maps
                return result
            if heatmaps is not None:
                values[heatmaps.output] = maps
            result = following
            return result

        gives = [(merge or head.steps[-1]).output]
        gives += [heatmaps.output] if heatmaps and merge else []
        return _Launch(launch, branches.Launch(tuple(gives), head.reads))


def _one_launch(subtree: Any, reads: int) -> Callable[[Values], Tensor]:
    """What runs a packed chain of blocks."""

    def launch(values: Values) -> Tensor:
        result: Tensor = subtree.run(values[reads])
        return result

    return launch


def _has_launch(step: Step) -> bool:
    """Whether a launch of hgfast's own stands for this step; PyTorch's operations do otherwise."""
    if isinstance(step, Conv):
        conv = step.conv
        return (
            conv.groups == 1
            and not conv.transposed
            and conv.dilation == (1, 1)
            and not step.relu_sum
        )
    return isinstance(step, (Bottleneck, Remerge, UpsampleAdd))
