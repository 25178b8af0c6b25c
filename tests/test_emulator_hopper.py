"""What only Hopper has, on the emulator: each model against numpy and torch, each check against
kernels with mistakes in them (tests/emulator/hopper_planted.cu), and against the same mended."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from emulator_checks import DTYPES, Planted, default_settings, random_words, words

emulator = pytest.importorskip("hgfast_emulator", reason="built without HGFAST_EMULATOR=1")


@pytest.fixture(autouse=True)
def settings():
    default_settings(emulator)
    yield
    default_settings(emulator)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


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
    "product_left_out": ("divergent products", GROUP),
    "product_of_half_a_group": ("no warpgroup", {"threads": 160}),
    "released_before_the_products": ("race", STAGE),
    "one_arrives_for_all": (("race", "deadlock"), STAGE),
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
    "between_the_steps": ("race", CLUSTER),
    "wait_without_arrival": ("divergent barrier", CLUSTER),
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
