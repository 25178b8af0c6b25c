"""Streams, graphs and repeats on the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_checks import (
    DEVICE,
    DTYPES,
    REHEARSAL,
    captured,
    map_of,
    moved,
    require_device,
    same_bits,
    small_network,
    some,
    synchronise,
)
from op_checks import bottleneck_weights, conv_weights
from torch import Tensor

import hgfast
from hgfast import ops

require_device()

DTYPE = DTYPES[0]
OPS = ["bottleneck", "bottleneck + low", "projected", "conv", "upsample_add", "network"]
each_op = pytest.mark.parametrize("name", OPS)


def call_of(name: str, x: Tensor) -> Callable[[], Tensor]:
    """An op, or a network, of a map (batch, 64, 20, 28) that may change between calls."""
    if name == "network":
        fast = hgfast.optimize(small_network().to(DTYPE), "medium", strict=True)
        return lambda: fast(x[:, :3, :16, :16])[-1]
    if name == "conv":
        w = moved(conv_weights(64, 32, (3, 3), norm=True))
        return lambda: ops.conv(x, **w, padding=1, relu=True)
    if name == "upsample_add":
        skip = map_of(x.shape[0], 64, 40, 56, dtype=DTYPE, seed=5)
        return lambda: ops.upsample_add(x, skip)
    w = moved(bottleneck_weights(64, 32, 64, project=name == "projected"))
    low = map_of(x.shape[0], 64, 10, 14, dtype=DTYPE, seed=5) if "low" in name else None
    return lambda: ops.bottleneck(x, **w, low=low)


def example(seed: int = 1, batch: int = 2) -> Tensor:
    return map_of(batch, 64, 20, 28, dtype=DTYPE, seed=seed)


@each_op
@torch.inference_mode()
def test_a_graph_replays_with_new_inputs(name: str) -> None:
    x = example()
    call = call_of(name, x)
    replay, output = captured(call)
    for seed in range(2, 7):
        x.copy_(example(seed))
        expected = call().clone()
        output.fill_(torch.nan)
        replay()
        synchronise()
        assert same_bits(output.contiguous(), expected.contiguous())


@each_op
@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no device memory to watch")
@torch.inference_mode()
def test_a_replay_allocates_nothing(name: str) -> None:
    replay, _ = captured(call_of(name, example()))
    replay()
    synchronise()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        replay()
    synchronise()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no streams")
@each_op
@torch.inference_mode()
def test_two_streams_at_once(name: str) -> None:
    """Each on inputs of its own; whatever the streams shared would give a wrong result."""
    inputs = [example(seed, batch=8) for seed in (1, 2)]
    calls = [call_of(name, x) for x in inputs]
    expected = [call().clone() for call in calls]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(200):
        for stream, call, result, count in zip(streams, calls, expected, wrong, strict=True):
            with torch.cuda.stream(stream):
                count += ~same_bits(call().contiguous(), result.contiguous())
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no streams")
@each_op
@torch.inference_mode()
def test_runs_in_the_current_stream(name: str) -> None:
    """Its input is made late in a side stream; a kernel in another stream would come too early."""
    x = example()
    call = call_of(name, x)
    late = example(seed=9)
    x.copy_(late)
    expected = call().clone()
    x.zero_()
    busy = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            busy = busy @ busy * 1e-4
        x.copy_(late)
        y = call()
        got = y.clone()
    stream.synchronize()
    assert same_bits(got.contiguous(), expected.contiguous())


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no streams")
@torch.inference_mode()
def test_packed_on_one_stream_and_run_on_another() -> None:
    """Packing comes late in its stream, and the model is dropped while the other may still run."""
    model, x = small_network().to(DTYPE), example()[:, :3, :16, :16].contiguous()
    expected = hgfast.optimize(model, "medium", strict=True)(x)[-1].clone()
    packing, running = torch.cuda.Stream(), torch.cuda.Stream()
    busy = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(packing):
        for _ in range(20):
            busy = busy @ busy * 1e-4
        fast = hgfast.optimize(model, "medium", strict=True)
    with torch.cuda.stream(running):
        for _ in range(20):
            busy = busy @ busy * 1e-4
        y = fast(x)[-1]
    del fast
    with torch.cuda.stream(packing):  # what was packed there is free now, if nobody said otherwise
        for _ in range(20):
            torch.full((1 << 16,), torch.nan, dtype=DTYPE, device=DEVICE)
    torch.cuda.synchronize()
    assert same_bits(y.contiguous(), expected.contiguous())


@pytest.mark.skipif(REHEARSAL, reason="a rehearsal has no graphs")
def test_a_graph_keeps_the_weights_that_it_was_captured_with() -> None:
    fast = hgfast.optimize(small_network().to(DTYPE), "medium", strict=True)
    x = example()[:, :3, :16, :16].contiguous()
    with torch.inference_mode():
        replay, output = captured(lambda: fast(x)[-1])
        replay()
        expected = output.clone()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.25)
    with torch.inference_mode():
        assert not same_bits(fast(x)[-1].contiguous(), expected.contiguous())  # packed anew
        for _ in range(20):
            torch.full((1 << 16,), torch.nan, dtype=DTYPE, device=DEVICE)
        replay()
        synchronise()
        assert same_bits(output.contiguous(), expected.contiguous())


@pytest.mark.parametrize("batch", [1, some(64, 2)])
@each_op
@torch.inference_mode()
def test_a_thousand_repeats_give_the_same_bits(name: str, batch: int) -> None:
    """A race or a read of what nobody wrote shows as a bit that moves."""
    call = call_of(name, example(batch=batch))
    first = call().clone().contiguous()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(some(1000, 20)):
        wrong += ~same_bits(call().contiguous(), first)
    assert int(wrong) == 0


@torch.inference_mode()
def test_a_thousand_repeats_at_the_hourglass_size() -> None:
    w = moved(bottleneck_weights(256, 128, 256))
    size = some(64, 8)
    x = map_of(some(8, 1), 256, size, size, dtype=DTYPE)
    first = ops.bottleneck(x, **w).clone().contiguous()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(some(1000, 20)):
        wrong += ~same_bits(ops.bottleneck(x, **w).contiguous(), first)
    assert int(wrong) == 0
