"""What only Hopper has, on the emulator: each model against numpy and torch, each check against
kernels with mistakes in them (tests/emulator/hopper_planted.cu), and against the same mended."""

from collections import Counter

import numpy as np
import pytest
import torch
from emulator_checks import DTYPES, Planted, default_settings, pages, random_words, words

emulator = pytest.importorskip("hgfast_emulator", reason="built without HGFAST_EMULATOR=1")


@pytest.fixture(autouse=True)
def settings():
    default_settings(emulator)
    yield
    default_settings(emulator)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# ---- Products ------------------------------------------------------------------------------------


def everywhere(run, seeds=range(5)):
    """What `run()` returns, a list of arrays: the same, and the same counters, in any order."""
    first = None
    for seed in seeds:
        emulator.set_seed(seed)
        emulator.set_threads(1 + seed % 3)
        arrays = run()
        seen = arrays, emulator.counters()
        if first is None:
            first = seen
        for got, expected in zip(arrays, first[0], strict=True):
            np.testing.assert_array_equal(got, expected)
        assert seen[1] == first[1]
    default_settings(emulator)
    return first[0]


def columns_of_eight(matrix: torch.Tensor) -> torch.Tensor:
    """(rows, k) as products want it: the first eight columns of all rows, then the next eight."""
    rows, k = matrix.shape
    return matrix.reshape(rows, k // 8, 8).permute(1, 0, 2).contiguous()


def operand(image: torch.Tensor, start: int, columns: int, rows: int, count: int) -> torch.Tensor:
    """(count, 16), as a descriptor, in bytes, finds it in a flat image of 16-bit elements."""
    row, k = torch.arange(count)[:, None], torch.arange(16)[None]
    at = start + row // 8 * rows + k // 8 * columns + row % 8 * 16 + k % 8 * 2
    return image[at // 2]


def multiply(dtype, n, image, table, before, fragments=None, seeds=range(2)):
    """Both sums behind the products of a table, each (64, n)."""
    table = np.array(table, np.uint32)
    name = f"products_{dtype}_{n}" + ("_registers" if fragments is not None else "")
    inputs = [words(image), table, before.numpy()]
    if fragments is not None:
        inputs.append(words(fragments))

    def run():
        got = np.empty((2, 64, n), np.float32)
        values = [image.numel() * 2, len(table)]
        emulator.run(name, inputs, [got], values, threads=128, shared_bytes=image.numel() * 2)
        return [got]

    return torch.from_numpy(everywhere(run, seeds)[0])


def reference(n, image, table, before, fragments=None):
    sums = before.double().clone()
    for i, (a, ac, ar, b, bc, br, accumulate, which, _) in enumerate(table):
        left = operand(image, a, ac, ar, 64) if fragments is None else fragments[i]
        product = left.double() @ operand(image, b, bc, br, n).double().T
        sums[which] = product + sums[which] * accumulate
    return sums


PRODUCTS = pytest.mark.parametrize(
    ("dtype", "n", "registers"),
    [(d, n, r) for d in DTYPES for n in (64, 128) for r in (False, True)],
)


@PRODUCTS
def test_products_add_up_to_those_of_matrices(dtype, n, registers):
    torch.manual_seed(0)
    k = 64
    a, b = torch.randn(64, k).to(DTYPES[dtype]), torch.randn(n, k).to(DTYPES[dtype])
    image = torch.cat([columns_of_eight(a).flatten(), columns_of_eight(b).flatten()])
    before = torch.randn(2, 64, n)
    # The first sums throw away what was there; the second ones keep it.
    table = []
    for which in (0, 1):
        for i in range(4):
            start_a, start_b = i * 2 * 64 * 16, 64 * k * 2 + i * 2 * n * 16
            accumulate, last = which or i > 0, i == 3
            table.append((start_a, 64 * 16, 128, start_b, n * 16, 128, accumulate, which, last))
    fragments = torch.stack([a[:, 16 * i : 16 * i + 16] for i in range(4)] * 2)
    got = multiply(dtype, n, image, table, before, fragments if registers else None)
    counters = emulator.counters()
    exact, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    expected = torch.stack([exact, before[1].double() + exact])
    bound = (size + before.double().abs()) * k * 2.0**-24
    assert ((got.double() - expected).abs() <= bound).all()
    assert counters["warpgroup_products"] == 8
    assert counters["flops"] == 8 * 2 * 64 * n * 16
    # Each warp reads its own rows of a, and the model counts all of b once for the four.
    assert counters["operand_bytes"] == 8 * 16 * 2 * (n + (0 if registers else 64))


@PRODUCTS
def test_products_find_every_element_by_its_descriptor(rng, dtype, n, registers):
    # Small integers: exact in any order, and a wrong place gives a wrong number.
    image = torch.from_numpy(rng.integers(-8, 9, 6000)).to(DTYPES[dtype])
    assert image.numel() * 2 % 16 == 0
    table = []
    for i in range(8):
        entry = []
        for count in (64, n):
            room = image.numel() * 2 // 16 - 8
            row = int(rng.integers(0, room // 2 // (count // 8)))
            column = int(rng.integers(0, room // 2))
            start = int(rng.integers(0, room - (count // 8 - 1) * row - column + 1))
            entry += [16 * start, 16 * column, 16 * row]
        table.append((*entry, i % 3 != 0, int(rng.integers(2)) if i < 4 else 1, i in (3, 7)))
    fragments = torch.from_numpy(rng.integers(-8, 9, (8, 64, 16))).to(DTYPES[dtype])
    fragments = fragments if registers else None
    before = torch.from_numpy(rng.integers(-50, 51, (2, 64, n))).float()
    got = multiply(dtype, n, image, table, before, fragments)
    assert torch.equal(got.double(), reference(n, image, table, before, fragments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_moves_over_pixels_in_steps_of_sixteen_bytes(rng, dtype):
    # A convolution along a row of 66 pixels of 16 channels: 64 results, three shifted operands.
    x = torch.from_numpy(rng.integers(-4, 5, (66, 16))).to(DTYPES[dtype])
    w = torch.from_numpy(rng.integers(-4, 5, (3, 64, 16))).to(DTYPES[dtype])
    parts = [columns_of_eight(x).flatten(), *(columns_of_eight(one).flatten() for one in w)]
    image = torch.cat(parts)
    table = [
        (16 * tap, 66 * 16, 128, 66 * 32 + tap * 2048, 1024, 128, tap > 0, 0, 2 * (tap == 2))
        for tap in range(3)
    ]
    got = multiply(dtype, 64, image, table, torch.zeros(2, 64, 64))
    expected = torch.nn.functional.conv1d(x.float().T[None], w.float().permute(1, 2, 0))[0].T
    assert torch.equal(got[0], expected)


def test_products_keep_nan_and_infinity():
    a, b = torch.zeros(64, 16, dtype=torch.bfloat16), torch.ones(64, 16, dtype=torch.bfloat16)
    a[3, 5], a[40, 6] = float("nan"), float("inf")
    image = torch.cat([columns_of_eight(a).flatten(), columns_of_eight(b).flatten()])
    table = [(0, 1024, 128, 2048, 1024, 128, 1, 0, 2)]
    got = multiply("bfloat16", 64, image, table, torch.ones(2, 64, 64))[0]
    assert got[3].isnan().all()
    assert got[40].isposinf().all()
    assert (got[[0, 63]] == 1).all()


def test_sums_are_nan_until_the_wait():
    launch = {"blocks": 2, "threads": 128, "shared_bytes": 4096}
    for name, numbers in (("sums_read_early", 0), ("sums_read_early_mended", 32)):
        out = np.empty(256, np.uint32)
        emulator.run(name, [], [out], [128], **launch)
        assert (out == numbers).all()


# ---- Tiles ---------------------------------------------------------------------------------------

BATCH, HEIGHT, WIDTH, CHANNELS = 2, 5, 7, 72
# Swizzle: (channels, width, height of a box).
BOXES = {0: (24, 4, 4), 1: (16, 8, 2), 2: (32, 4, 4), 3: (64, 4, 2)}


def map_of(array: int, swizzle: int):
    return (array, (BATCH, HEIGHT, WIDTH, CHANNELS, *BOXES[swizzle], swizzle))


def swizzled(box: np.ndarray, swizzle: int, start: int = 0) -> np.ndarray:
    """A box (pixels, channels) of 16 bits as it lies in shared memory from `start` on, flat."""
    pieces = box.reshape(-1, 8)
    if swizzle == 0:
        return pieces.reshape(-1)
    count = 1 << swizzle
    at = start // 16 + np.arange(len(pieces))
    to = at ^ (at // 8 % count)
    out = np.empty_like(pieces)
    out[to - start // 16] = pieces
    return out.reshape(-1)


def padded(x: np.ndarray, margin: int, fill) -> np.ndarray:
    return np.pad(x, [(margin, margin)] * 3 + [(80, 80)], constant_values=fill)


def box_of(x: np.ndarray, at, swizzle: int) -> np.ndarray:
    """The box of a padded map at (channel, x, y, image): (pixels, channels)."""
    channels, width, height = BOXES[swizzle]
    c, column, row, image = at
    box = x[image + 20, row + 20 : row + 20 + height, column + 20 : column + 20 + width]
    return box[:, :, c + 80 : c + 80 + channels].reshape(-1, channels)


@pytest.mark.parametrize("swizzle", BOXES)
def test_boxes_of_a_map_with_zeros_outside(rng, swizzle):
    channels, width, height = BOXES[swizzle]
    x = rng.integers(1, 2**16, (BATCH, HEIGHT, WIDTH, CHANNELS), dtype=np.uint16)
    right, down = WIDTH - width + 1, HEIGHT - height + 1
    at = [
        *((0, 0, 0, 0), (8, 1, 1, 1), (0, -1, 0, 0), (0, right, 0, 1), (0, 0, -1, 1)),
        *((0, 0, down, 0), (0, -1, -1, 0), (0, right, down, 1), (72 - channels + 8, 0, 0, 1)),
        *((-8, 0, 0, 0), (-8, -1, down, 1)),  # cut off on each side, and in the corners
        *((0, -width, 0, 0), (0, WIDTH, 0, 0), (0, 0, -height, 0), (0, 0, HEIGHT, 1)),
        *((0, 0, 0, -1), (0, 0, 0, BATCH), (72, 0, 0, 0), (-channels, 0, 0, 0)),  # all outside
    ]
    for _ in range(20):
        at.append((int(rng.integers(-9, 10)) * 8, *(int(i) for i in rng.integers(-9, 10, 2)), 1))
    size = channels * width * height
    start = 1024
    coordinates = np.array(at, np.int32)

    def run():
        got = np.empty((len(at), size), np.uint16)
        emulator.run(
            "load_tile",
            [coordinates, x],
            [got],
            [len(at), 2 * size, start],
            shared_bytes=start + 2 * size + 8,
            maps=[map_of(1, swizzle)],
        )
        return [got]

    got = everywhere(run)[0]
    counters = emulator.counters()
    whole = padded(x, 20, 0)
    loaded = 0
    for one, where in zip(got, at, strict=True):
        box = box_of(whole, where, swizzle)
        loaded += 2 * np.count_nonzero(box)
        np.testing.assert_array_equal(one, swizzled(box, swizzle, start), err_msg=str(where))
    assert (got[11:19] == 0).all()
    assert counters["tile_bytes"] == got.nbytes
    assert counters["global_bytes_loaded"] == loaded + coordinates.nbytes


@pytest.mark.parametrize("swizzle", BOXES)
def test_boxes_go_back_into_a_map_cut_off_at_its_edges(rng, swizzle):
    channels, width, height = BOXES[swizzle]
    y = rng.integers(0, 2**16, (BATCH, HEIGHT, WIDTH, CHANNELS), dtype=np.uint16)
    whole = padded(y, 20, 0xABCD)
    at = [
        (c, column, row, image)
        for c in range(-8, CHANNELS, channels)
        for column in range(-1, WIDTH, width)
        for row in range(1 - height, HEIGHT, height)
        for image in range(-1, BATCH + 1)
    ]
    rng.shuffle(at)
    boxes = np.stack([swizzled(box_of(whole, where, swizzle), swizzle) for where in at])
    coordinates = np.array(at, np.int32)
    size = boxes.shape[1] * 2

    def run():
        got = np.empty_like(y)
        emulator.run(
            "store_tile",
            [coordinates, boxes],
            [got],
            [len(at), size],
            shared_bytes=2 * size,
            maps=[map_of(2, swizzle)],
        )
        return [got]

    np.testing.assert_array_equal(everywhere(run)[0], y)
    assert emulator.counters()["stored_tile_bytes"] == y.nbytes


def test_a_box_comes_when_the_thread_that_asked_has_ended(rng):
    x = rng.integers(0, 2**16, (BATCH, HEIGHT, WIDTH, CHANNELS), dtype=np.uint16)
    size = 2 * np.prod(BOXES[0])

    def run():
        got = np.empty(size // 2, np.uint16)
        launch = {"threads": 64, "shared_bytes": size + 8, "maps": [map_of(0, 0)]}
        emulator.run("brief_producer", [x], [got], [size], **launch)
        return [got]

    box = box_of(padded(x, 20, 0), (0, 0, 0, 0), 0)
    np.testing.assert_array_equal(everywhere(run)[0], box.reshape(-1))


def test_a_map_larger_than_its_array_is_out_of_bounds(rng):
    x = rng.integers(0, 2**16, (BATCH, HEIGHT - 1, WIDTH, CHANNELS), dtype=np.uint16)
    channels, width, height = BOXES[0]
    size = 2 * channels * width * height
    launch = {"shared_bytes": size + 8, "maps": [map_of(1, 0)]}
    got = np.empty(size // 2, np.uint16)
    for image, row in ((0, 0), (1, 1)):
        at = np.array([0, 0, row, image], np.int32)
        if image == 0:
            emulator.run("load_tile", [at, x], [got], [1, size, 0], **launch)
            continue
        with pytest.raises(RuntimeError, match=r"out of bounds: .*load_tile .* of array 1"):
            emulator.run("load_tile", [at, x], [got], [1, size, 0], **launch)


def test_boxes_pass_through_the_modelled_cache(rng):
    emulator.model_memory(True)
    x = rng.integers(0, 2**16, (BATCH, HEIGHT, WIDTH, CHANNELS), dtype=np.uint16)
    channels, width, height = BOXES[0]
    size = 2 * channels * width * height
    # The same box three times: from memory once, by sectors of 32 bytes, of which each pixel's
    # 48 bytes touch up to three.
    at = np.zeros((3, 4), np.int32)
    got = np.empty((3, size // 2), np.uint16)
    launch = {"shared_bytes": size + 8, "maps": [map_of(1, 0)]}
    emulator.run("load_tile", [at, x], [got], [3, size, 0], **launch)
    read = emulator.counters()["dram_bytes_read"] - at.nbytes
    assert size <= read <= 2 * size + 64
    assert got.nbytes <= emulator.counters()["dram_bytes_written"] <= got.nbytes + 32


@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 8, 12, 8, 4, 4, 0),  # the bytes of a pixel
        (1, 8, 8, 16, 12, 4, 4, 0),  # of a row of the box
        (1, 8, 8, 16, 8, 257, 1, 0),
        (1, 8, 8, 16, 8, 4, 0, 0),
        (1, 8, 8, 64, 64, 4, 4, 2),  # more than the swizzle's rows
        (1, 8, 8, 64, 16, 4, 4, 2),  # and less: the engine pads these, and nobody wants that
        (0, 8, 8, 16, 8, 4, 4, 0),
    ],
)
def test_a_map_that_the_engine_does_not_take_is_refused(shape):
    with pytest.raises(ValueError, match="takes no such map"):
        emulator.run("relu", [np.zeros(32, np.float32)], maps=[(0, shape)])


@pytest.mark.parametrize(("size", "offset"), [(16, 0), (48, 16), (4096, 112)])
def test_bytes_come_as_they_lie_in_memory(rng, size, offset):
    x = random_words(rng, 3, size // 4)

    def run():
        y = np.empty_like(x)
        launch = {"blocks": 3, "shared_bytes": 16 + offset + size}
        emulator.run("load_bulk", [x], [y], [size, offset], **launch)
        return [y]

    np.testing.assert_array_equal(everywhere(run)[0], x)
    assert emulator.counters()["bulk_bytes"] == x.nbytes


# ---- Blocks and warps that work together ---------------------------------------------------------


@pytest.mark.parametrize("masks", [(3, 3), (2, 1), (3, 0), (15, 15, 15, 15), (9, 6, 0, 5)])
def test_multicast_brings_the_same_to_many_blocks(rng, masks):
    ranks, size, rounds = len(masks), 64, 3
    blocks = 2 * ranks
    x = random_words(rng, rounds, blocks, size // 4)

    def run():
        y = np.empty((rounds, blocks, ranks, size // 4), np.uint32)
        emulator.run(
            "multicast",
            [x, np.array(masks, np.uint32)],
            [y],
            [size, rounds, ranks, blocks],
            blocks=blocks,
            cluster=ranks,
            shared_bytes=16 + ranks * size,
        )
        return [y]

    got = everywhere(run)[0]
    for block in range(blocks):
        for rank, mask in enumerate(masks):
            came = mask >> block % ranks & 1
            expected = x[:, block // ranks * ranks + rank] if came else 0xFFFFFFFF
            np.testing.assert_array_equal(got[:, block, rank], expected)
    arrivals = sum(mask.bit_count() for mask in masks)
    assert emulator.counters()["bulk_bytes"] == rounds * arrivals * size * 2


@pytest.mark.parametrize(
    ("stages", "warps", "rounds"), [(1, 1, 5), (2, 4, 9), (3, 2, 13), (4, 4, 3)]
)
def test_a_ring_of_stages_hands_everything_over_in_order(rng, stages, warps, rounds):
    x = random_words(rng, 3, rounds, warps * 32, 4)

    def run():
        y = np.empty_like(x)
        emulator.run(
            "ring",
            [x],
            [y],
            [rounds, stages, warps],
            blocks=3,
            threads=(warps + 1) * 32,
            shared_bytes=stages * (16 + warps * 32 * 16),
        )
        return [y]

    np.testing.assert_array_equal(everywhere(run, range(10))[0], x)
    assert emulator.counters()["barrier_phases"] == 3 * 2 * rounds


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["remote_by_barrier", "remote_by_cluster"])
def test_blocks_store_into_one_another(rng, name, ranks):
    x = random_words(rng, 2, ranks, 32, 8)

    def run():
        y = np.empty_like(x)
        launch = {"blocks": 2 * ranks, "cluster": ranks, "shared_bytes": 16 + 1024}
        emulator.run(name, [x], [y], [ranks], **launch)
        return [y]

    np.testing.assert_array_equal(everywhere(run)[0], np.roll(x, 1, axis=1))
    more = 4 * 32 * 2 * ranks if name == "remote_by_barrier" else 0
    assert emulator.counters()["remote_bytes"] == x.nbytes + more


def test_work_goes_on_between_the_steps_of_a_clusters_barrier(rng):
    rounds, x = 5, random_words(rng, 4, 32)

    def run():
        y = np.empty_like(x)
        launch = {"blocks": 4, "cluster": 2, "shared_bytes": 256}
        emulator.run("split_barrier", [x], [y], [rounds], **launch)
        return [y]

    expected = x
    for _ in range(rounds):
        expected = 3 * expected[:, ::-1] + expected[[1, 0, 3, 2]]
    np.testing.assert_array_equal(everywhere(run)[0], expected)
    assert emulator.counters()["cluster_barriers"] == 2 * (1 + 2 * rounds)


def test_some_threads_wait_for_one_another(rng):
    rounds, x = 6, random_words(rng, 128)

    def run():
        y = np.empty_like(x)
        emulator.run("sync_some", [x], [y], [rounds], threads=128, shared_bytes=512)
        return [y]

    thread, expected = np.arange(128), x
    for _ in range(rounds):
        near = expected[thread // 64 * 64 + (thread + 33) % 64]
        expected = 5 * (expected + near) + expected[127 - thread]
    np.testing.assert_array_equal(everywhere(run)[0], expected)
    assert emulator.counters()["partial_barriers"] == rounds * (2 + 2)


def test_registers_go_from_warpgroup_to_warpgroup(rng):
    x = random_words(rng, 384)

    def run():
        y = np.empty_like(x)
        emulator.run("registers", [x], [y], threads=384, registers=128)
        return [y]

    np.testing.assert_array_equal(everywhere(run)[0], x)
    with pytest.raises(RuntimeError, match=r"bad registers: .*does not tell its registers"):
        emulator.run("registers", [x], [np.empty_like(x)], threads=384)


def test_what_is_constant_may_be_read_before_the_kernel_in_front_ends(rng):
    x, y = random_words(rng, 2, 64), np.empty(64, np.uint32)
    launch = {"threads": 64, "programmatic": True}
    for seed in range(5):
        emulator.set_seed(seed)
        emulator.run("programmatic", list(x), [y], constants=[0], **launch)
        np.testing.assert_array_equal(y, x[0] + x[1])
        with pytest.raises(RuntimeError, match=r"too early: .* of array 0"):
            emulator.run("programmatic", list(x), [y], **launch)


@pytest.mark.parametrize(
    ("launch", "text"),
    [
        ({"blocks": 4, "cluster": 3}, "4 blocks in clusters of 3"),
        ({"blocks": 17, "cluster": 17}, "not whole clusters of 1 to 16"),
        ({"threads": 512, "registers": 136}, "136 registers for each of 512 threads"),
    ],
)
def test_a_launch_that_no_gpu_takes_is_refused(launch, text):
    x = np.zeros(4096, np.float32)
    with pytest.raises(RuntimeError, match=f"bad launch: kernel relu: .*{text}"):
        emulator.run("relu", [x], [np.empty_like(x)], [32], **launch)


# ---- Mistakes ------------------------------------------------------------------------------------

THREADS, BLOCKS = 64, 2
LAUNCH = {"blocks": BLOCKS, "threads": THREADS, "shared_bytes": 4096 + 64}
CLUSTER = {"cluster": 2, "blocks": 4}
GROUP = {"threads": 128}  # one warpgroup
STAGE = {"threads": 160, "words": 1024}  # that, and a warp that loads 4096 bytes
# Eight pixels of eight channels in a row, in boxes of all, or of four.
ROW, HALF = (1, 1, 8, 8, 8, 8, 1, 0), (1, 1, 8, 8, 8, 4, 1, 0)
STORED = {"blocks": 1, "threads": 32, "maps": [(1, ROW)]}
HALVES = {"blocks": 1, "threads": 32, "maps": [(1, HALF), (0, HALF)]}
REGISTERS = {"threads": 256, "registers": 128}
TABLE = {
    "stage_read_early": (("copy in flight", "race"), {}),
    "wrong_parity": (("copy in flight", "race", "deadlock"), {}),
    "arrives_twice": ("race", {}),
    "too_many_arrivals": ("too many arrivals", {}),
    "bytes_that_never_come": ("deadlock", {}),
    "arrival_missing": ("deadlock", {}),
    "barrier_used_unordered": (("race", "no barrier"), {}),
    "barrier_not_fenced": ("not fenced", {}),
    "store_onto_barrier": ("barrier touched", {}),
    "stage_not_released": (("copy in flight", "race"), {}),
    "loaded_twice": ("copy in flight", {}),
    "load_over_unfenced": ("not fenced", {}),
    "load_never_waited_for": ("ended too early", {}),
    "sync_some_of_other_counts": ("divergent barrier", {}),
    "sync_some_without_all": ("deadlock", {}),
    "sync_some_for_others": ("race", {}),
    "operand_not_fenced": ("not fenced", GROUP),
    "fence_behind_barrier": ("not fenced", GROUP),
    "operand_never_written": ("uninitialised", GROUP),
    "misaligned_operand": ("misaligned", GROUP),
    "products_not_begun": ("products not begun", GROUP),
    "touched_since_begun": ("products not begun", GROUP),
    "products_never_waited_for": ("products never waited for", GROUP),
    "divergent_lanes": ("divergent products", GROUP),
    "divergent_warps": ("divergent products", GROUP),
    "divergent_operands": ("divergent products", GROUP),
    "product_left_out": ("divergent products", GROUP),
    "product_of_half_a_group": ("no warpgroup", {"threads": 160}),
    "released_before_the_products": ("race", STAGE),
    "one_arrives_for_all": (("race", "deadlock"), STAGE),
    "told_to_one_lane": ("race", STAGE),
    "tile_not_fenced": ("not fenced", STORED),
    "tile_overwritten": ("race", STORED),
    "tile_overwritten_by_others": ("race", STORED),
    "tile_never_waited_for": ("copy never waited for", STORED),
    "tile_not_committed": ("copy never waited for", STORED),
    "tile_stored_twice": ("written twice", HALVES),
    "misaligned_tile": ("misaligned", HALVES),
    "bytes_without_zeros": ("deadlock", HALVES),
    "barrier_of_other_block": (("no barrier", "race"), CLUSTER),
    "block_not_begun": ("not begun", CLUSTER),
    "remote_not_ordered": ("race", CLUSTER),
    "remote_told_by_arrival": ("not ordered", CLUSTER),
    "between_the_steps": ("race", CLUSTER),
    "wait_without_arrival": ("divergent barrier", CLUSTER),
    "lanes_apart_at_cluster": ("divergent warp", CLUSTER),
    "no_such_block": ("no such block", CLUSTER),
    "ends_before_an_arrival": ("ended too early", CLUSTER),
    "ends_before_a_store": ("ended too early", CLUSTER),
    "ends_before_a_copy": ("ended too early", CLUSTER),
    "multicast_over_readers": (("copy in flight", "race"), CLUSTER),
    "registers_never_free": ("deadlock", REGISTERS),
    "raised_below": ("bad registers", {"threads": 128, "registers": 128}),
    "registers_of_one_warp": ("divergent registers", {"threads": 128, "registers": 128}),
    "read_too_early": ("too early", {"programmatic": True}),
    "written_too_early": ("too early", {"programmatic": True, "inputs": 2, "constants": [1]}),
    "tile_too_early": ("too early", HALVES | {"programmatic": True}),
}
PLANTED = Planted(emulator, "hopper_planted.cu", TABLE, LAUNCH)


def test_every_planted_kernel_is_tested():
    assert PLANTED.listed() == {*TABLE, "sums_read_early"}
    assert {name + "_mended" for name in TABLE} <= set(emulator.probes())


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_reported_with_its_place(name):
    PLANTED.check_report(name)


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_found_in_any_order_and_never_where_there_is_none(name):
    PLANTED.check_in_any_order(name, range(12))


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("bytes_that_never_come", ["lacks 0 of 1 arrivals and 64 bytes in phase 0"]),
        (
            "bytes_without_zeros",
            ["to which 32 bytes too many came", "threads 0-31 wait in"],
        ),
        ("arrival_missing", ["the barrier at byte offset 4104", "lacks 1 of 64 arrivals"]),
        ("too_many_arrivals", ["thread 5 ", "has all its 1 arrivals and waits for 256 bytes"]),
        ("registers_never_free", ["threads 224-255 wait in raise_registers"]),
        ("registers_never_free", ["for 224 registers a thread, and 2048 are left"]),
        ("raised_below", ["to 120, and the warp has 128"]),
        ("tile_stored_twice", ["byte offset 48 of array 1, which block 0, thread 0"]),
        ("misaligned_tile", ["byte offset 64 of shared memory, not a multiple of 128"]),
        ("block_not_begun", ["block 0, thread", "shared memory of block 1, and nothing says"]),
        ("remote_not_ordered", ["of shared memory of block ", "with no barrier between them"]),
        ("ends_before_an_arrival", ["block 0, thread", "of block 1, came before"]),
        ("ends_before_a_copy", ["none of its threads has waited for the copy of tests/emulator"]),
        ("no_such_block", ["names block 2 of a cluster of 2"]),
        ("sync_some_of_other_counts", ["32 threads at barrier 3", "for 64"]),
        ("product_left_out", ["thread 64 (warp 2, lane 0)"]),
        ("divergent_lanes", ["thread 70 (warp 2, lane 6)"]),
        ("tile_not_fenced", ["store_tile", "with no fence_async of that thread between them"]),
        (
            "load_over_unfenced",
            ["load_bulk", "writes byte offset 0 of shared memory, which thread"],
        ),
    ],
)
def test_a_report_tells_who_and_where(name, texts):
    emulator.set_threads(1)
    report = PLANTED.report(name)
    for text in texts:
        assert text in report, report


def test_a_report_leaves_nothing_behind():
    names = ("stage_read_early", "released_before_the_products", "ends_before_a_copy")

    def reports(count):
        for seed in range(count):
            emulator.set_seed(seed)
            for name in names:
                PLANTED.report(name)
                PLANTED.run(name + "_mended")

    reports(400)  # each host thread keeps what the largest launch that it met has needed
    before = pages()
    reports(120)
    assert pages() - before < 500  # 2 MB, of 720 launches with 128 stacks or more each


# ---- Random programs -----------------------------------------------------------------------------

READ, WRITE, ARRIVE, WAIT, SOME, ALL = range(1, 7)


class Program:
    """Actions (steps, threads), as the probe `hopper_program` wants them, and their order.

    What a step does depends on earlier steps alone, so nothing can wait for ever; and whatever
    arrives at a barrier for its next phase has waited for the phase before, so that every wait is
    for the same arrivals in any order.
    """

    threads, steps, arrivals = 96, 15, 8

    def __init__(self, rng: np.random.Generator, words: int) -> None:
        self.words = words
        self.actions = np.zeros((self.steps, self.threads), np.uint32)
        self.barriers = 0
        self.free_to_go: list[tuple[int, int]] = []  # synchronisation that may be taken out
        self.synchronise(rng)
        self.touch(rng)

    def set(self, step: int, threads, what: int, which: int = 0, value: int = 0) -> None:
        self.actions[step, threads] = what | which << 3 | value << 8

    def synchronise(self, rng: np.random.Generator) -> None:
        for step in range(self.steps):
            kind = rng.random()
            if kind < 0.06:
                self.set(step, slice(None), ALL)
                self.free_to_go.append((step, -1))
            elif kind < 0.3:
                warps = rng.permutation(3)[: rng.integers(1, 3)]
                threads = (warps[:, None] * 32 + np.arange(32)).ravel()
                if not self.actions[step, threads].any():
                    self.set(step, threads, SOME, 1 + step, len(threads))
                    self.free_to_go.append((step, -1))
        for _ in range(int(rng.integers(1, 12))):
            self.phases(rng, self.barriers)
            self.barriers += 1

    def phases(self, rng: np.random.Generator, barrier: int) -> None:
        """One barrier: who waits for a phase arrives for the next one; the last waits are alone."""
        group = rng.permutation(self.threads)[: self.arrivals]
        step = int(rng.integers(0, 4))
        last = np.full(self.threads, -1)
        placed = []
        for phase in range(int(rng.integers(1, 4))):
            # As late as the last arrival, every thread at a step of its own that is free.
            end = -1
            for thread in group:
                at = self.next_free(int(max(step, last[thread] + 1)), thread)
                if at is None:
                    return self.take_back(placed, barrier, phase)
                self.set(at, thread, ARRIVE, barrier)
                placed.append((phase, at, thread))
                last[thread] = at
                end = max(end, at)
            # A parity tells phases apart for those alone who have seen the one before.
            waiting = rng.permutation(self.threads)[: self.arrivals] if phase == 0 else group
            for thread in waiting:
                at = self.next_free(int(max(end + 1, last[thread] + 1)), thread)
                if at is None:
                    return self.take_back(placed, barrier, phase)
                self.set(at, thread, WAIT, barrier, phase)
                placed.append((phase, at, thread))
                last[thread] = at
            group, step = waiting, end + 1
        self.last_waits(placed)
        return None

    def take_back(self, placed: list, barrier: int, phase: int) -> None:
        """There was no room for a whole phase: what of it was placed goes."""
        for of, step, thread in placed:
            if of == phase:
                self.actions[step, thread] = 0
        self.last_waits([one for one in placed if one[0] < phase])

    def last_waits(self, placed: list) -> None:
        final = max((of for of, _, _ in placed), default=-1)
        self.free_to_go += [
            (step, thread)
            for of, step, thread in placed
            if of == final and self.actions[step, thread] & 7 == WAIT
        ]

    def next_free(self, step: int, thread: int) -> int | None:
        free = np.nonzero(self.actions[step:, thread] == 0)[0]
        return step + int(free[0]) if len(free) else None

    def order(self, visit) -> None:
        """visit(step, thread, clock) for each action, in steps; a clock: what its thread knows."""
        clocks = np.zeros((self.threads, self.threads), int)
        phase = np.zeros(self.barriers, int)
        missing = np.full(self.barriers, self.arrivals)
        told = np.zeros((self.barriers, 4, self.threads), int)  # by the end of each phase
        every = np.arange(self.threads)
        for step in range(self.steps):
            clocks[every, every] = step + 1
            for thread in every:
                visit(step, int(thread), clocks[thread])
            what = self.actions[step] & 7
            for kind in (SOME, ALL):
                here = np.nonzero(what == kind)[0]
                if len(here):
                    clocks[here] = clocks[here].max(axis=0)
            for thread in np.nonzero(what == WAIT)[0]:
                action = int(self.actions[step, thread])
                barrier, of = action >> 3 & 31, action >> 8
                assert phase[barrier] == of + 1
                clocks[thread] = np.maximum(clocks[thread], told[barrier, of])
            for thread in np.nonzero(what == ARRIVE)[0]:
                barrier = int(self.actions[step, thread]) >> 3 & 31
                now = phase[barrier]
                told[barrier, now] = np.maximum(told[barrier, now], clocks[thread])
                missing[barrier] -= 1
                if missing[barrier] == 0:
                    missing[barrier], phase[barrier] = self.arrivals, now + 1

    def touch(self, rng: np.random.Generator) -> None:
        """Fills what is free with reads and writes, of which no two collide."""
        seen: dict[int, list] = {}

        def visit(step, thread, clock):
            if self.actions[step, thread] or rng.random() < 0.4:
                return
            for _ in range(4):
                word, writes = int(rng.integers(self.words)), bool(rng.random() < 0.4)
                touches = seen.setdefault(word, [])
                if not any(collide(other, (step, thread, writes), clock) for other in touches):
                    touches.append((step, thread, writes))
                    self.set(step, thread, WRITE if writes else READ, 0, word)
                    return

        self.order(visit)

    def has_race(self) -> bool:
        """Whether two threads touch a word, one of them writing, unordered: each pair."""
        seen: dict[int, list] = {}
        races = []

        def visit(step, thread, clock):
            action = int(self.actions[step, thread])
            if action & 7 not in (READ, WRITE):
                return
            touch = step, thread, action & 7 == WRITE
            touches = seen.setdefault(action >> 8, [])
            races.extend(other for other in touches if collide(other, touch, clock))
            touches.append(touch)

        self.order(visit)
        return bool(races)

    def run(self) -> None:
        arrivals = np.full(32, self.arrivals, np.uint32)
        emulator.run(
            "hopper_program",
            [self.actions, arrivals],
            [np.empty(self.threads, np.uint32)],
            [self.threads, self.steps, self.words, self.barriers],
            threads=self.threads,
            shared_bytes=8 * self.barriers + 4 * self.words,
        )


def collide(earlier, later, clock) -> bool:
    """Whether two touches (step, thread, writes) do; clock: what the later one knows."""
    return (
        earlier[1] != later[1] and (earlier[2] or later[2]) and clock[earlier[1]] < earlier[0] + 1
    )


@pytest.mark.parametrize("seed", range(4))
def test_races_are_found_where_every_pair_of_accesses_says_so(seed):
    rng = np.random.default_rng(seed)
    seen = Counter()
    for run in range(40):
        program = Program(rng, int(rng.choice([12, 40, 200])))
        emulator.set_seed(run % 7)
        assert not program.has_race()
        program.run()
        seen["accesses"] += int(np.isin(program.actions & 7, (READ, WRITE)).sum())
        # Without some of its waits and barriers it may have a race.
        share = rng.choice([0.05, 0.3])
        for step, thread in program.free_to_go:
            if rng.random() > share:
                continue
            if thread >= 0:
                program.actions[step, thread] = 0
            else:
                program.actions[step, np.isin(program.actions[step] & 7, (SOME, ALL))] = 0
        racy = program.has_race()
        seen[racy] += 1
        if racy:
            with pytest.raises(RuntimeError, match=r"^race: kernel hopper_program"):
                program.run()
        else:
            program.run()
    assert seen[True] > 8
    assert seen[False] > 8
    assert seen["accesses"] > 40 * 300
