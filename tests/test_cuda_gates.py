"""What the compiler made of the CUDA kernels, for every architecture: no GPU is needed.

A kernel that spills, waits where it should not or lost its matrix instructions is still right, only
slow; so it is looked for here, where every change passes. `make resources` writes the table of
registers anew after a change that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path

import cuda_gates
import pytest
from cuda_gates import (
    ARCHITECTURES,
    LEAST_SHARED,
    MOST_SHARED,
    REGISTERS,
    ROOT,
    TABLE,
    Compiled,
    Kernel,
)

pytestmark = pytest.mark.skipif(cuda_gates.missing() is not None, reason=str(cuda_gates.missing()))

#: Of both kernels over clusters of blocks.
CLUSTERED: list[tuple[str, ...]] = [
    ("HMMA",),
    ("UBLKCP",),  # weights, by the copy engine
    ("SYNCS",),
    ("UCGABAR_ARV",),  # barriers of the cluster
    ("UCGABAR_WAIT",),
    ("ST.E.128",),  # into the other blocks' shared memory
    ("ACQBULK",),  # the wait for the kernel in front,
    ("PREEXIT",),  # and leave for the one behind
    ("LDSM",),
    ("LDG.E.128",),
    ("STG.E.128",),
]

#: What each kernel is meant to be made of; one opcode of each row must be there.
MEANT = {
    "bottleneck_kernel": [
        ("HMMA", "HGMMA"),  # matrix products
        ("LDGSTS",),  # cp.async: weights come while products are computed
        ("LDSM",),  # ldmatrix
        ("LDG.E.128",),
        ("STG.E.128",),
    ],
    "head_kernel": [("HMMA", "HGMMA"), ("LDGSTS",), ("LDSM",), ("LDG.E.128",), ("STG.E.128",)],
    # Pixels come one by one, in any of four dtypes; their fragments in pairs of 16 bits.
    "stem_kernel": [("HMMA",), ("LDGSTS",), ("LDG.E.U8",), ("LDS",), ("LDS.128",), ("STG.E.128",)],
    "upsample_add_kernel": [("LDG.E.128",), ("STG.E.128",)],
    "hopper_bottleneck_kernel": [
        ("HGMMA",),
        ("UTMALDG",),  # tiles, by the copy engine
        ("UTMASTG",),
        ("UBLKCP",),  # weights, to both blocks of a cluster
        ("SYNCS",),  # barriers that count
        ("USETMAXREG",),
        ("LDSM",),
        ("STSM",),
    ],
    "latency_kernel": CLUSTERED,
    "subtree_kernel": CLUSTERED,
}
#: And how often, where the number says that nothing was unrolled, kept back or done twice.
COUNTED = {
    # conv1 on the tile and around it 2 each, conv2 4, conv3 8, its projection 2
    "hopper_bottleneck_kernel": {"HGMMA": 18, "HMMA": 0},
    # What the kernel in front writes may not come through the cache for constants; and of the waits
    # only the cluster's three drop the L1 cache.
    "latency_kernel": {"LDG.CONSTANT": 0, "CCTL.IVALL": 3},
    "subtree_kernel": {"LDG.CONSTANT": 0, "CCTL.IVALL": 3},
}
LOCAL_MEMORY = ("LDL", "STL")

each_source = pytest.mark.parametrize(("source", "architecture"), cuda_gates.pairs())


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], Compiled]:
    return cuda_gates.examine_all()


@pytest.fixture
def result(compiled: dict[tuple[str, str], Compiled], source: str, architecture: str) -> Compiled:
    return compiled[source, architecture]


@each_source
def test_every_kernel_was_read(result: Compiled) -> None:
    """The tools' formats change; then the other tests must not pass, seeing nothing."""
    assert result.kernels
    for kernel in result.kernels:
        assert kernel.registers > 0, kernel.name
        assert kernel.instructions.get("EXIT"), kernel.name
        assert "(" not in kernel.family, kernel.name
        assert "hgfast" not in kernel.name


@each_source
def test_nothing_spills(result: Compiled) -> None:
    wrong = {
        kernel.name: f"{kernel.stack} bytes of stack, {kernel.spilled} bytes spilled"
        for kernel in result.kernels
        if kernel.stack or kernel.spilled
    }
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


@each_source
def test_no_local_memory(result: Compiled) -> None:
    wrong = {
        kernel.name: [(opcode, kernel.count(opcode)) for opcode in LOCAL_MEMORY]
        for kernel in result.kernels
        if any(kernel.count(opcode) for opcode in LOCAL_MEMORY)
    }
    assert not wrong


@each_source
def test_the_compiler_has_nothing_to_say(result: Compiled) -> None:
    """Such as that it serialised matrix instructions (C7512, C7519), or ignored a register cap."""
    assert result.complaints == []


@each_source
def test_a_block_fits_into_the_registers(result: Compiled) -> None:
    for kernel in result.kernels:
        assert kernel.threads, f"{kernel.name} has no __launch_bounds__: ptxas cannot know its cap"
        # registers are handed out by the warp, in eights for each lane
        of_block = -(-kernel.registers // 8) * 8 * -(-kernel.threads // 32) * 32
        assert of_block <= REGISTERS, f"{kernel.name}: {kernel.registers} x {kernel.threads}"


@each_source
def test_made_of_the_instructions_meant(result: Compiled) -> None:
    for kernel in result.kernels:
        assert kernel.family in MEANT, f"say in MEANT what {kernel.family} is to be made of"
        for choices in MEANT[kernel.family]:
            assert any(map(kernel.count, choices)), f"{kernel.name} has no {' or '.join(choices)}"


@each_source
def test_as_many_products_as_written(result: Compiled) -> None:
    """Serialised products would be waited for one by one; products unrolled would be more."""
    for kernel in result.kernels:
        for opcode, number in COUNTED.get(kernel.family, {}).items():
            assert kernel.count(opcode) == number, f"{kernel.name}: {opcode}"


def test_the_table_is_of_these_kernels(compiled: dict[tuple[str, str], Compiled]) -> None:
    committed = json.loads(TABLE.read_text())
    found = cuda_gates.table(compiled.values())
    assert committed["kernels"].keys() == found["kernels"].keys(), "run `make resources`"
    for name, row in found["kernels"].items():
        assert committed["kernels"][name]["threads"] == row["threads"], "run `make resources`"


def test_registers_are_as_committed(compiled: dict[tuple[str, str], Compiled]) -> None:
    committed = json.loads(TABLE.read_text())
    found = cuda_gates.table(compiled.values())
    if not cuda_gates.variants():
        pytest.skip("needs the emulator's module, which knows the shared memory: make build")
    if committed["nvcc"] != found["nvcc"]:
        pytest.skip(f"the table is nvcc {committed['nvcc']}'s; this is {found['nvcc']}")
    assert committed == found, "if the change is meant, run `make resources` and commit the table"
    assert TABLE.read_text() == cuda_gates.written(found)


def test_launches_fit_the_compiled_kernels(compiled: dict[tuple[str, str], Compiled]) -> None:
    """Threads as in __launch_bounds__, and shared memory that there is on every device; only the
    kernels for any number of channels may ask for more, and are then not chosen there."""
    variants = cuda_gates.variants()
    if not variants:
        pytest.skip("needs the emulator's module, which knows the shared memory: make build")
    kernels = {kernel.name: kernel for result in compiled.values() for kernel in result.kernels}
    launched = {cuda_gates.variant_of(name): kernel for name, kernel in kernels.items()}
    assert variants.keys() <= launched.keys()
    for name, row in variants.items():
        kernel = launched[name]
        assert row["threads"] == kernel.threads, name
        hopper = name.startswith(("hopper_", "latency<", "subtree<"))
        most = MOST_SHARED if ", any, " in name or hopper else LEAST_SHARED
        assert kernel.shared + row["shared_bytes"] <= most, name


def test_two_blocks_of_a_cluster_fit_on_a_multiprocessor() -> None:
    """So that the next kernel's weights can come while this one computes. A block has 1 KiB more
    than it asks for, of 228."""
    rows = json.loads(TABLE.read_text())["kernels"]
    found = {name: row for name, row in rows.items() if name.startswith("latency_kernel")}
    assert len(found) == 6
    for name, row in found.items():
        assert row["shared"] + 1024 <= 114 * 1024, name
        assert 2 * row["threads"] * -(-row["registers"]["sm_90a"] // 8) * 8 <= REGISTERS, name


def test_the_flags_are_the_builds() -> None:
    flags = cuda_gates.flags()
    assert "-std=c++17" in flags
    assert "-O3" in flags
    assert not any(str(ROOT) in flag or flag.endswith((".cu", ".o")) for flag in flags)


# ---- That the gates close ----

BAD = """
#include <cuda_runtime.h>
static int side;  // that nothing uses, which nvcc says
template <int n>
__global__ void no_bounds(float* y) { y[threadIdx.x] = n; }
template __global__ void no_bounds<3>(float*);
__global__ void __launch_bounds__(1024) spilling(float* y) {
  float a[96];
  for (int i = 0; i < 96; ++i) a[i] = y[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; ++i) y[(95 - i) * 1024 + threadIdx.x] = a[i] * a[(i * 7) % 96];
}
__global__ void __launch_bounds__(64) indexed(float* y, int n) {
  float a[64];
  for (int i = 0; i < n; ++i) a[i] = y[i];
  for (int i = 0; i < n; ++i) y[i] = a[n - i] + a[n / 2];
}
"""


@pytest.fixture(scope="module", params=ARCHITECTURES[::3])
def bad(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Kernel]:
    folder: Path = tmp_path_factory.mktemp("bad")
    source = folder / "bad.cu"
    source.write_text(BAD)
    result = cuda_gates.examine(source, request.param, cuda_gates.flags(), folder / "bad.cubin")
    assert any("variable" in line and "side" in line for line in result.complaints)
    return {kernel.name: kernel for kernel in result.kernels}


def test_a_spill_is_seen(bad: dict[str, Kernel]) -> None:
    assert bad["spilling"].spilled > 0
    assert bad["spilling"].count("STL") > 0
    assert bad["spilling"].threads == 1024
    assert bad["spilling"].registers <= 64


def test_an_indexed_array_is_seen(bad: dict[str, Kernel]) -> None:
    assert bad["indexed"].stack >= 256
    assert bad["indexed"].count("LDL") > 0


def test_missing_bounds_and_narrow_accesses_are_seen(bad: dict[str, Kernel]) -> None:
    kernel = bad["no_bounds<3>"]
    assert kernel.threads == 0
    assert kernel.family == "no_bounds"
    assert kernel.count("STG") == kernel.count("STG.E") == 1
    assert kernel.count("STG.E.128") == kernel.count("LDL") == kernel.count("HMMA") == 0


def test_readable_names() -> None:
    assert (
        cuda_gates.readable(
            "void hgfast::cuda::(anonymous namespace)::k<hgfast::cuda::C<hgfast::cuda::BFloat16, "
            "64, true>, (hgfast::cuda::E)1>(hgfast::cuda::P)"
        )
        == "k<C<BFloat16, 64, true>, E(1)>"
    )
    kernel = "bottleneck_kernel<BottleneckConfig<Float16, 64, false, 4, 8, 2, 2>>"
    assert cuda_gates.variant_of(kernel) == "bottleneck<float16, any, 4x8>"
    kernel = "head_kernel<HeadConfig<BFloat16, 128, 32, 3, 4>>"
    assert cuda_gates.variant_of(kernel) == "head<bfloat16, 128, 32>"
    assert cuda_gates.variant_of("stem_kernel<StemConfig<Float16, 4>>") == "stem<float16, 32>"
    assert cuda_gates.variant_of("upsample_add_kernel<Float16>") is None


def test_flags_of_a_command() -> None:
    command = (
        "/usr/bin/nvcc -forward-unknown-to-host-compiler -O3 -std=c++17 -Xcompiler=-fPIC "
        "--generate-code=arch=compute_80,code=sm_80 -MD -MT a.o -MF a.d -x cu -c a.cu -o a.o"
    )
    assert cuda_gates.flags_of(command) == (
        "-forward-unknown-to-host-compiler",
        "-O3",
        "-std=c++17",
        "-Xcompiler=-fPIC",
    )
