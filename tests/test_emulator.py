"""The emulator that runs CUDA kernels on a CPU: its models against numpy and torch, its checks
against kernels with mistakes in them (tests/emulator/planted.cu), and against the same mended."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from emulator import mutants
from emulator_checks import DTYPES, Planted, default_settings, pages, random_words, words

emulator = pytest.importorskip("hgfast_emulator", reason="built without HGFAST_EMULATOR=1")

HOPPER_COUNTERS = (
    "partial_barriers", "cluster_barriers", "barrier_phases", "warpgroup_products",
    "operand_bytes", "tile_bytes", "stored_tile_bytes", "bulk_bytes", "remote_bytes",
)  # fmt: skip
NAN16 = 0x7FFF  # what the conversions give, of either format


@pytest.fixture(autouse=True)
def settings():
    default_settings(emulator)
    yield
    default_settings(emulator)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_is_that_of_matrices(dtype):
    torch.manual_seed(0)
    for _ in range(20):
        a = torch.randn(16, 16).to(DTYPES[dtype])
        b = torch.randn(16, 8).to(DTYPES[dtype])
        d, got = torch.randn(16, 8), torch.empty(16, 8)
        emulator.run(
            f"product_{dtype}", [words(a), words(b), d.numpy()], [got.numpy()], shared_bytes=512
        )
        expected = d.double() + a.double() @ b.double()
        bound = (d.double().abs() + a.double().abs() @ b.double().abs()) * 16 * 2.0**-24
        assert ((got.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_puts_every_element_in_its_place(dtype):
    # Small integers: exact, whatever the order; and a unit matrix shows each element alone.
    a = torch.arange(256).reshape(16, 16).to(DTYPES[dtype])
    for first in (0, 8):
        b = torch.eye(16)[:, first : first + 8].to(DTYPES[dtype])
        got = torch.empty(16, 8)
        emulator.run(
            f"product_{dtype}",
            [words(a), words(b), np.zeros((16, 8), np.float32)],
            [got.numpy()],
            shared_bytes=512,
        )
        assert torch.equal(got, a[:, first : first + 8].float())


def test_product_keeps_nan_and_infinity():
    a, b = torch.zeros(16, 16, dtype=torch.bfloat16), torch.ones(16, 8, dtype=torch.bfloat16)
    a[3, 5], a[4, 6] = float("nan"), float("inf")
    got = torch.empty(16, 8)
    d = np.ones((16, 8), np.float32)
    emulator.run("product_bfloat16", [words(a), words(b), d], [got.numpy()], shared_bytes=512)
    assert got[3].isnan().all()
    assert got[4].isposinf().all()
    assert (got[[0, 15]] == 1).all()


def test_load_matrices_deals_rows_out_to_lanes(rng):
    rows = random_words(rng, 3, 32, 4)
    order = rng.permutation(32)
    got = np.empty_like(rows)
    emulator.run(
        "load_matrices",
        [rows, (16 * order).astype(np.uint32)],
        [got],
        [1],
        blocks=3,
        shared_bytes=512,
    )
    lane = np.arange(32)
    for matrix in range(4):
        expected = rows[:, order[8 * matrix + lane // 4], lane % 4]
        np.testing.assert_array_equal(got[:, :, matrix], expected)


def test_store_matrices_is_the_way_back(rng):
    fragments = random_words(rng, 3, 32, 4)
    order = rng.permutation(32)
    got = np.empty_like(fragments)
    offsets = (16 * order).astype(np.uint32)
    emulator.run("store_matrices", [fragments, offsets], [got], blocks=3, shared_bytes=512)
    lane = np.arange(32)
    for matrix in range(4):
        rows = got[:, order[8 * matrix + lane // 4], lane % 4]
        np.testing.assert_array_equal(rows, fragments[:, :, matrix])


@pytest.mark.parametrize("kind", ["uint32", "float", "float2", "uint4", "float4"])
def test_shared_memory_holds_every_type(rng, kind):
    size = {"uint32": 1, "float": 1, "float2": 2, "uint4": 4, "float4": 4}[kind]
    x = random_words(rng, 5, 96, size)
    y = np.empty_like(x)
    emulator.run(
        f"exchange_{kind}", [x], [y], [96], blocks=5, threads=96, shared_bytes=96 * 4 * size
    )
    np.testing.assert_array_equal(y, x[:, ::-1])


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16, 31])
def test_shuffle_takes_the_other_lanes_value(rng, mask):
    x = random_words(rng, 64)
    f = rng.standard_normal(64).astype(np.float32)
    got, got_f = np.empty_like(x), np.empty_like(f)
    emulator.run("shuffle", [x, f], [got, got_f], [mask], threads=64)
    other = np.arange(64) ^ mask
    np.testing.assert_array_equal(got, x[other])
    np.testing.assert_array_equal(got_f, f[other])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copies_arrive_in_their_groups(rng, seed):
    emulator.set_seed(seed)
    rounds, threads, valid = 9, 64, 6
    x = random_words(rng, rounds, threads, 4)
    y = np.empty_like(x)
    emulator.run(
        "copy", [x], [y], [rounds, valid, threads], threads=threads, shared_bytes=4 * threads * 16
    )
    np.testing.assert_array_equal(y[:valid], x[:valid])
    assert (y[valid:] == 0).all()


def on_all(name, *inputs, output):
    """Run an element-wise probe over arrays of 32 * n elements."""
    blocks = len(output) // 32
    emulator.run(name, list(inputs), [output], [32], blocks=blocks)
    return output


def hard_floats() -> np.ndarray:
    """Floats near everything that a conversion to 16 bits could get wrong, some of them doubled."""
    rng = np.random.default_rng(1)
    all16 = np.arange(2**16, dtype=np.uint32)
    bfloat16 = (all16 << 16).view(np.float32)
    with np.errstate(invalid="ignore"):
        float16 = all16.astype(np.uint16).view(np.float16).astype(np.float32)
    finite = float16[:0x7C00].astype(float)  # positive, in order
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    bfloat16_ties = (all16 << 16 | 0x8000).view(np.float32)
    values = [bfloat16, float16, ties, -ties, bfloat16_ties]
    for near in (ties, bfloat16_ties):
        bits = near.view(np.uint32)
        values += [(bits + np.uint32(1)).view(np.float32), (bits - np.uint32(1)).view(np.float32)]
    edge = [65504, 65519.996, 65520, 65536, 1e38, 3.4e38, 1e-45, 2**-24, 2**-25, 2**-14]
    edge = np.array([*edge, np.inf, np.nan, 0], np.float32)
    values += [edge, -edge, rng.integers(0, 2**32, 2**16, dtype=np.uint32).view(np.float32)]
    flat = np.concatenate(values)
    return np.concatenate([flat, flat[: -len(flat) % 64]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_rounds_to_nearest_even(dtype):
    x = hard_floats().reshape(-1, 2)
    got = on_all(f"pack_{dtype}", x, output=np.empty(len(x), np.uint32))
    expected = torch.from_numpy(x).to(DTYPES[dtype]).view(torch.int16).numpy().view(np.uint16)
    expected = np.where(np.isnan(x), NAN16, expected)
    np.testing.assert_array_equal(got & 0xFFFF, expected[:, 0])
    np.testing.assert_array_equal(got >> 16, expected[:, 1])
    assert np.isnan(x).any()


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_is_exact(dtype, flush):
    every = np.arange(2**16, dtype=np.uint16)
    pairs = np.stack([every, every[::-1]], axis=1)
    tensor = torch.from_numpy(pairs.view(np.int16)).view(DTYPES[dtype])
    expected = tensor.float().numpy()
    try:
        torch.set_flush_denormal(flush)
        emulator.set_threads(1)
        got = on_all(f"unpack_{dtype}", words(tensor), output=np.empty((2**16, 2), np.float32))
    finally:
        torch.set_flush_denormal(False)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got.view(np.uint32)[number], expected.view(np.uint32)[number])


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_lets_nan_win(rng, dtype):
    a, b = random_words(rng, 2**16), random_words(rng, 2**16)
    special = {"bfloat16": [0x7F80, 0xFF80, 0x7FC0], "float16": [0x7C00, 0xFC00, 0x7E00]}[dtype]
    special = np.array([*special, 0, 0x8000, 1, 0x8001], np.uint32)
    a[: 7**2] = np.repeat(special, 7) << 16 | np.tile(special, 7)
    b[: 7**2] = np.tile(special, 7) << 16 | np.repeat(special, 7)
    got = on_all(f"maximum_{dtype}", a, b, output=np.empty_like(a))
    x, y, z = (
        torch.from_numpy(w.view(np.int16)).view(DTYPES[dtype]).float().numpy() for w in (a, b, got)
    )
    expected = np.maximum(x, y)  # which lets NaN win too
    np.testing.assert_array_equal(z, expected)
    assert (got.view(np.uint16)[np.isnan(expected)] == NAN16).all()
    zeros = (x == 0) & (y == 0)
    np.testing.assert_array_equal(np.signbit(z)[zeros], np.signbit(x)[zeros] & np.signbit(y)[zeros])


def test_relu_keeps_nan():
    x = hard_floats()
    got = on_all("relu", x, output=np.empty_like(x))
    np.testing.assert_array_equal(got, torch.relu(torch.from_numpy(x)).numpy())
    assert not np.signbit(got[~np.isnan(got)]).any()


# ---- Turns, counters, memory ---------------------------------------------------------------------


def work(rng_seed=0, blocks=1, rounds=20):
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(rng_seed)).bfloat16()
    y = np.zeros((256, 4), np.float32)
    emulator.run("work", [words(x)], [y], [rounds], threads=256, shared_bytes=4096)
    return y


def test_results_depend_on_neither_seed_nor_host_threads(rng):
    x = random_words(rng, 40, 128, 4)
    expected_work, results = work(), []
    for seed in range(5):
        for threads in (1, 2, 5):
            emulator.set_seed(seed)
            emulator.set_threads(threads)
            y = np.empty_like(x)
            emulator.run(
                "exchange_uint4", [x], [y], [128], blocks=40, threads=128, shared_bytes=2048
            )
            results.append((y, emulator.counters()))
            np.testing.assert_array_equal(work(), expected_work)
    for y, counters in results:
        np.testing.assert_array_equal(y, x[:, ::-1])
        assert counters == results[0][1]


def test_counters_of_a_known_kernel():
    rounds, warps = 20, 8
    work(rounds=rounds)
    assert emulator.counters() == {
        "name": "work",
        "blocks": 1,
        "threads": 256,
        "shared_bytes": 4096,
        "block_barriers": 1,
        "warp_barriers": 0,
        "shuffles": 0,
        "multiply_adds": rounds * warps,
        "flops": rounds * warps * 2 * 16 * 8 * 16,
        "load_matrices": rounds * warps,
        "store_matrices": 0,
        "matrix_conflicts": 0,
        "shared_bytes_loaded": 0,
        "shared_bytes_stored": 4096,
        "async_bytes": 0,
        **dict.fromkeys(HOPPER_COUNTERS, 0),
        "global_bytes_loaded": 4096,
        "global_bytes_stored": 4096,
        "minimum_bytes": 8192,
        "dram_bytes_read": None,
        "dram_bytes_written": None,
    }


def test_counters_of_copies(rng):
    x = random_words(rng, 9, 64, 4)
    emulator.run("copy", [x], [np.empty_like(x)], [9, 6, 64], threads=64, shared_bytes=4096)
    counters = emulator.counters()
    assert counters["async_bytes"] == 9 * 64 * 16
    assert counters["global_bytes_loaded"] == 6 * 64 * 16  # zeros are not asked for
    assert counters["block_barriers"] == 9
    assert counters["shared_bytes_loaded"] == counters["global_bytes_stored"] == 9 * 64 * 16


@pytest.mark.parametrize(
    ("stride", "extra"), [(16, 0), (32, 1), (64, 3), (128, 7), (144, 0), (0, 0)]
)
def test_bank_conflicts_of_matrices(rng, stride, extra):
    # All four matrices are the same eight rows; a row that several lanes want is no conflict.
    rows, got = random_words(rng, 3, 32, 4), np.empty((32, 4), np.uint32)
    offsets = (np.arange(32) % 8 * stride).astype(np.uint32)
    emulator.run("load_matrices", [rows, offsets], [got], [3], shared_bytes=3 * 512)
    assert emulator.counters()["matrix_conflicts"] == 4 * extra


def test_memory_model_counts_what_a_cache_lets_through(rng):
    emulator.model_memory(True)
    x = random_words(rng, 40, 128, 4)
    y = np.empty_like(x)
    launch = {"blocks": 40, "threads": 128, "shared_bytes": 2048}
    emulator.run("exchange_uint4", [x], [y], [128], **launch)
    counters = emulator.counters()
    # Arrays may begin in the middle of a sector.
    assert x.nbytes <= counters["dram_bytes_read"] <= x.nbytes + 32
    assert y.nbytes <= counters["dram_bytes_written"] <= y.nbytes + 32
    assert counters["minimum_bytes"] == x.nbytes + y.nbytes

    # What is read again, comes from the cache; what is too large for it, does not.
    rows = random_words(rng, 64, 4)
    emulator.run("reread", [rows], [y], [64, 3], blocks=40, threads=128)
    assert rows.nbytes <= emulator.counters()["dram_bytes_read"] <= rows.nbytes + 32
    large = np.zeros((60 << 20) // 16 * 4, np.uint32)
    many = len(large) // 4
    emulator.run("reread", [large], [y[:1]], [many, 2], blocks=1, threads=128)
    assert emulator.counters()["dram_bytes_read"] >= 2 * large.nbytes


def test_memory_model_is_deterministic(rng):
    emulator.model_memory(True)
    x = random_words(rng, 40, 128, 4)
    seen = []
    for threads in (1, 3):
        emulator.set_threads(threads)
        emulator.run(
            "exchange_uint4",
            [x],
            [np.empty_like(x)],
            [128],
            blocks=40,
            threads=128,
            shared_bytes=2048,
        )
        seen.append(emulator.counters())
    assert seen[0] == seen[1]


# ---- Mistakes ------------------------------------------------------------------------------------

THREADS, BLOCKS = 64, 2
LAUNCH = {"blocks": BLOCKS, "threads": THREADS, "shared_bytes": 4 * THREADS}
# Kernel: (the kind of its report, what is special about its launch).
TABLE = {
    "read_after_write": ("race", {}),
    "write_after_read": ("race", {}),
    "write_after_write": ("race", {}),
    "missing_sync_warp": (("race", "uninitialised"), {}),
    "sync_warp_for_block": ("race", {}),
    "matrices_without_barrier": (
        "race",
        {"blocks": 1, "threads": 32, "shared_bytes": 512, "words": 128, "out": 128},
    ),
    "wrong_halo": ("out of bounds", {}),
    "copy_too_long": ("out of bounds", {}),
    "copy_too_short": ("uninitialised", {}),
    "missing_wait": ("copy in flight", {}),
    "wait_without_barrier": (("race", "copy in flight", "uninitialised"), {}),
    "one_pending_too_many": ("copy in flight", {"shared_bytes": 32 * THREADS, "words": 512}),
    "missing_commit": ("copy in flight", {"shared_bytes": 16 * THREADS, "words": 256}),
    "copy_over_readers": ("race", {}),
    "misaligned_shared": ("misaligned", {"shared_bytes": 16 * THREADS}),
    "misaligned_global": ("misaligned", {"words": 256}),
    "divergent_barrier": ("divergent barrier", {}),
    "barrier_without_all": ("deadlock", {}),
    "written_twice": ("written twice", {}),
    "never_written": ("never written", {}),
    "write_to_input": ("write to an input", {}),
    "read_of_output": ("read of an output", {}),
    "shuffle_without_all": ("deadlock", {}),
    "divergent_warp": ("divergent warp", {}),
    "in_flight_at_exit": (
        "copy never waited for",
        {"shared_bytes": 16 * THREADS, "words": 256},
    ),
}


PLANTED = Planted(emulator, "planted.cu", TABLE, LAUNCH)


def test_every_planted_kernel_is_tested():
    assert PLANTED.listed() == set(TABLE)
    assert {name + "_mended" for name in TABLE} <= set(emulator.probes())


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_reported_with_its_place(name):
    places = PLANTED.marks(name)
    assert name == "never_written" or places["HERE"] or len(places["BRANCH"]) == 2
    PLANTED.check_report(name)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("read_after_write", ["block 0, thread 32 (warp 1, lane 0)", "byte offset 0 of shared"]),
        ("write_after_read", ["writes byte offset", "read at"]),
        ("wrong_halo", ["block 1, thread 63 (warp 1, lane 31)", "byte offset 512 of array 0 (512"]),
        ("copy_too_long", ["thread 16 ", "16 bytes at byte offset 256", "which has 256 bytes"]),
        ("copy_too_short", ["thread 63 ", "byte offset 252 of shared"]),
        ("misaligned_shared", ["byte offset 4 of shared memory, not a multiple of 8"]),
        ("misaligned_global", ["byte offset 4 of array 0", "no multiple of 16"]),
        ("barrier_without_all", ["threads 0-4, 6-63 wait in sync_block", "threads 5 have ended"]),
        ("shuffle_without_all", ["threads 0-8, 10-31 wait in shuffle_xor", "9, 32-63 have ended"]),
        ("written_twice", ["block 1, thread 0", "offset 252 of array 1, which block 0, thread 63"]),
        ("never_written", ["4 of the 512 bytes of array 1", "offset 268"]),
        ("write_to_input", ["block 0, thread 0", "byte offset 0 of array 0"]),
    ],
)
def test_a_report_tells_who_and_where(name, texts):
    emulator.set_threads(1)
    report = PLANTED.report(name)
    for text in texts:
        assert text in report, report


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_found_in_any_order_and_never_where_there_is_none(name):
    PLANTED.check_in_any_order(name, range(5))


def has_race(actions: np.ndarray, barriers: np.ndarray) -> bool:
    """Whether two threads touch a word, one of them writing, with no barrier between: each pair.

    actions: (steps, threads), barriers: (steps, warps), as the probe `program` wants them.
    """
    for word in np.unique(actions[actions % 4 != 0] >> 2):
        touches = [
            (int(step), int(thread), actions[step, thread] % 4 == 2)
            for step, thread in zip(
                *np.nonzero((actions % 4 != 0) & (actions >> 2 == word)), strict=True
            )
        ]
        for i, (step, thread, writes) in enumerate(touches):
            for other_step, other, other_writes in touches[i + 1 :]:
                if thread == other or not (writes or other_writes):
                    continue
                between = barriers[step:other_step, thread // 32]
                enough = 1 if thread // 32 == other // 32 else 2
                if not (between >= enough).any():
                    return True
    return False


@pytest.mark.parametrize("seed", range(4))
def test_races_are_found_where_every_pair_of_accesses_says_so(seed):
    rng = np.random.default_rng(seed)
    steps, threads = 6, 96
    seen = []
    for run in range(150):
        words = int(rng.choice([40, 400, 4000]))
        action = rng.choice(3, (steps, threads), p=[0.7, 0.2, 0.1]).astype(np.uint32)
        actions = rng.integers(0, words, (steps, threads)).astype(np.uint32) << 2 | action
        actions[action == 0] = 0
        if run % 2:  # each warp on words of its own, where its own barriers are enough
            word = (actions >> 2) // 4 * 4 + np.arange(threads, dtype=np.uint32) // 32
            actions = np.where(action > 0, word << 2 | action, 0).astype(np.uint32)
            words += 4
        barriers = rng.choice(2, (steps, threads // 32), p=[0.3, 0.7]).astype(np.uint32)
        barriers[rng.random(steps) < 0.4] = 2
        emulator.set_seed(run)
        racy = has_race(actions, barriers)
        seen.append(racy)
        launch = {"threads": threads, "shared_bytes": 4 * words}
        arrays = [actions, barriers], [np.empty(threads, np.uint32)], [threads, steps, words]
        if racy:
            with pytest.raises(RuntimeError, match=r"^race: kernel program"):
                emulator.run("program", *arrays, **launch)
        else:
            emulator.run("program", *arrays, **launch)
    assert 0.1 < np.mean(seen) < 0.9


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_blocks_report_is_given(threads):
    # Every block has a mistake; whichever host thread is first, block 0's is told.
    emulator.set_threads(threads)
    for _ in range(20):
        assert "block 0, thread 32 " in PLANTED.report("read_after_write")


def test_a_report_leaves_nothing_behind():
    for _ in range(50):
        for name in ("read_after_write", "barrier_without_all", "missing_wait", "divergent_warp"):
            PLANTED.report(name)
    before = pages()
    for _ in range(500):
        for name in ("read_after_write", "barrier_without_all", "missing_wait", "divergent_warp"):
            PLANTED.report(name)
    assert pages() - before < 500  # 2 MB, of 2000 launches with 64 stacks each
    work()


def test_launches_from_several_threads_stay_apart(rng):
    x = random_words(rng, 40, 128, 4)
    problems = []

    def good():
        for _ in range(20):
            y = np.empty_like(x)
            emulator.run(
                "exchange_uint4", [x], [y], [128], blocks=40, threads=128, shared_bytes=2048
            )
            if not np.array_equal(y, x[:, ::-1]) or emulator.counters()["blocks"] != 40:
                problems.append("result")

    def bad():
        for _ in range(20):
            try:
                PLANTED.run("read_after_write")
                problems.append("no report")
            except RuntimeError as error:
                if "kernel read_after_write" not in str(error):
                    problems.append(str(error))

    threads = [threading.Thread(target=target) for target in (good, bad, good, bad)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"threads": 33}, "33 threads in a block"),
        ({"threads": 2048}, "2048 threads in a block"),
        ({"shared_bytes": 228 * 1024}, "bytes of shared memory"),
    ],
)
def test_a_launch_that_no_gpu_takes_is_refused(launch, words):
    x = np.zeros(4096, np.float32)
    with pytest.raises(RuntimeError, match=f"bad launch: kernel relu: .*{words}"):
        emulator.run("relu", [x], [np.empty_like(x)], [32], **launch)


def test_outputs_may_not_share_bytes_with_other_arrays():
    x = np.zeros(48, np.float32)
    with pytest.raises(RuntimeError, match=r"bad launch.*array 1 is written, and shares bytes"):
        emulator.run("relu", [x[:32]], [x[16:]], [32])


# ---- Changed copies of kernels -------------------------------------------------------------------

KERNEL = """
#include "launch.cuh"
namespace hgfast::cuda {
struct ReverseParams { const char* x; char* y; };
template <class Visit>
void visit_arrays(const ReverseParams& p, Visit&& visit) {
  visit(p.x, 1024, false);
  visit(p.y, 1024, true);
}
__global__ void reverse_kernel(const __grid_constant__ ReverseParams p) {
  const int thread = thread_index();
  copy_async(shared_memory() + 16 * thread, p.x + 16 * thread);
  commit_copies();
  wait_copies<0>();
  sync_block();
  store_global(p.y + 16 * thread, load_shared<uint4>(shared_memory() + 16 * (63 - thread)));
}
cudaError_t reverse(const ReverseParams& p) {
  return launch<reverse_kernel>("reverse", {1, 64, 1024, 1024}, nullptr, p);
}
}
"""
DRIVER = """
#include <cuda_runtime.h>
namespace hgfast::cuda {
struct ReverseParams { const char* x; char* y; };
cudaError_t reverse(const ReverseParams& p);
}
extern "C" const char* run(void** arrays) {
  return cudaGetErrorString(hgfast::cuda::reverse(
      {static_cast<const char*>(arrays[0]), static_cast<char*>(arrays[1])}));
}
"""


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("objects")


def run_changed(source: str, directory: Path, cache: Path, flags: tuple[str, ...] = ()):
    library = mutants.build(
        {"reverse.cu": source}, DRIVER, directory, only=["reverse.cu"], cache=cache, flags=flags
    )
    x = np.arange(256, dtype=np.uint32).reshape(64, 4)
    report, (_, y) = mutants.run(library, [x, np.zeros_like(x)])
    return report, np.array_equal(y, x[::-1])


@pytest.mark.parametrize(
    ("removed", "kind"),
    [
        ("sync_block", "uninitialised"),
        ("wait_copies<0>", "copy in flight"),
        ("commit_copies", "copy in flight"),
    ],
)
def test_a_changed_copy_of_a_kernel_is_compiled_and_run(tmp_path, objects, removed, kind):
    assert KERNEL.count(f"{removed}();") == 1
    source = KERNEL.replace(f"{removed}();", "")
    report, _ = run_changed(source, tmp_path / "changed", objects)
    assert re.match(f"{kind}: kernel reverse, .*csrc/cuda/reverse.cu:16", report), report


# The switch in assembly, and the one that other processors than x86-64 use.
@pytest.mark.parametrize("flags", [(), ("-DHGFAST_EMULATOR_UCONTEXT",)])
def test_an_unchanged_copy_of_a_kernel_has_no_report(tmp_path, objects, flags):
    assert run_changed(KERNEL, tmp_path / "same", objects, flags) == ("", True)
