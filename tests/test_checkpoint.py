"""Checkpoints: names, prefixes, containers, files, and files that should be refused."""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from field.princeton import PoseNet
from torch import Tensor, nn
from torch.nn import functional as F

from hgfast.models import hourglass, load_checkpoint
from hgfast.models.checkpoint import bearpaw_name, princeton_name

State = dict[str, Tensor]
SIZES = {"stacks": 2, "features": 16, "blocks": 2, "depth": 3, "joints": 5}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and statistics that are not what a fresh model has, so that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for shift in (module.running_mean, module.bias):
                shift.data.normal_(0, 0.3, generator=generator)
            for scale in (module.running_var, module.weight):
                scale.data.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def bearpaw_state(**sizes: int) -> State:
    """A state_dict as a public checkpoint holds it."""
    options = {**SIZES, **sizes}
    model = randomised(hourglass(**options, stem="bearpaw"))
    return {
        bearpaw_name(name, options["depth"]): value.clone()
        for name, value in model.state_dict().items()
    }


def bearpaw_forward(
    state: State, image: Tensor, stacks: int, blocks: int, depth: int
) -> list[Tensor]:
    """The network that the bearpaw names mean, written from the names alone."""

    def conv(name: str, x: Tensor, **options: int) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm_relu(name: str, x: Tensor) -> Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.relu(F.batch_norm(x, *(state[f"{name}.{part}"] for part in parts)))

    def bottleneck(name: str, x: Tensor) -> Tensor:
        y = conv(f"{name}.conv1", norm_relu(f"{name}.bn1", x))
        y = conv(f"{name}.conv2", norm_relu(f"{name}.bn2", y), padding=1)
        y = conv(f"{name}.conv3", norm_relu(f"{name}.bn3", y))
        projected = f"{name}.downsample.0.weight" in state
        return y + (conv(f"{name}.downsample.0", x) if projected else x)

    def several(name: str, x: Tensor) -> Tensor:
        for block in range(blocks):
            x = bottleneck(f"{name}.{block}", x)
        return x

    def descend(name: str, level: int, x: Tensor) -> Tensor:
        low = several(f"{name}.{level}.1", F.max_pool2d(x, 2))
        low = descend(name, level - 1, low) if level else several(f"{name}.0.3", low)
        low = several(f"{name}.{level}.2", low)
        return several(f"{name}.{level}.0", x) + F.interpolate(low, scale_factor=2)

    x = norm_relu("bn1", conv("conv1", image, stride=2, padding=3))
    x = F.max_pool2d(bottleneck("layer1.0", x), 2)
    x = bottleneck("layer3.0", bottleneck("layer2.0", x))
    heatmaps = []
    for stack in range(stacks):
        y = several(f"res.{stack}", descend(f"hg.{stack}.hg", depth - 1, x))
        y = norm_relu(f"fc.{stack}.1", conv(f"fc.{stack}.0", y))
        heatmaps.append(conv(f"score.{stack}", y))
        if stack < stacks - 1:
            x = x + conv(f"fc_.{stack}", y) + conv(f"score_.{stack}", heatmaps[-1])
    return heatmaps


def assert_same_weights(model: nn.Module, state: Mapping[str, Tensor], depth: int = 3) -> None:
    loaded = {bearpaw_name(name, depth): value for name, value in model.state_dict().items()}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "sizes",
    [
        {"stacks": 1, "blocks": 1, "depth": 1, "joints": 1},
        {"stacks": 2, "blocks": 3, "depth": 2},
        {"stacks": 3, "blocks": 1, "depth": 4, "features": 32, "joints": 16},
    ],
)
def test_bearpaw_names_mean_this_network(sizes: dict[str, int]) -> None:
    state = bearpaw_state(**sizes)
    options = {**SIZES, **sizes}
    model = load_checkpoint(state)
    image = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = bearpaw_forward(
            state, image, options["stacks"], options["blocks"], options["depth"]
        )
        given = model(image)
    assert len(given) == options["stacks"]
    for heatmap, reference in zip(given, expected, strict=True):
        assert heatmap.shape == (2, options["joints"], 16, 16)
        torch.testing.assert_close(heatmap, reference, rtol=1e-5, atol=1e-5)


def princeton(
    stacks: int = 2, features: int = 16, joints: int = 5, depth: int = 3, increase: int = 0
) -> nn.Module:
    """The network of that layout, written apart from this library, with its names."""
    torch.manual_seed(stacks)
    stem = features // 4, features // 2
    return randomised(PoseNet(stacks, features, joints, depth, increase, stem))


def assert_princeton(model: nn.Module, loaded: nn.Module, side: int = 64) -> None:
    """In float64: the two layouts of memory round differently in float32."""
    image = torch.randn(1, side, side + 64, 3, generator=torch.Generator().manual_seed(1)).double()
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(image)
        given = copy.deepcopy(loaded).double()(image.permute(0, 3, 1, 2))
    assert len(given) == expected.shape[1]
    for stack, heatmap in enumerate(given):
        torch.testing.assert_close(heatmap, expected[:, stack], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "sizes",
    [
        {"stacks": 1, "depth": 1, "joints": 1},
        {"stacks": 2, "depth": 3},
        {"stacks": 8, "depth": 4, "features": 32, "joints": 16},
    ],
)
def test_princeton_names_mean_this_network(sizes: dict[str, int]) -> None:
    model = princeton(**sizes)
    loaded = load_checkpoint(model)
    assert_princeton(model, loaded)
    # And back: each of its weights is one of the given, and all but the unused are there.
    state = model.state_dict()
    read = {princeton_name(name): value for name, value in loaded.state_dict().items()}
    assert all(torch.equal(state[name], value) for name, value in read.items())
    unread = state.keys() - read.keys()
    assert unread
    assert all("skip_layer" in name and not is_needed(model, name) for name in unread)


def is_needed(model: nn.Module, skip_layer: str) -> bool:
    return bool(model.get_submodule(skip_layer.split(".skip_layer")[0]).need_skip)


def test_princeton_hg8_at_true_size() -> None:
    torch.manual_seed(0)
    model = randomised(PoseNet())
    loaded = load_checkpoint({f"model.module.{k}": v for k, v in model.state_dict().items()})
    assert len(loaded.hourglasses) == 8
    assert loaded.heads[7].heatmap.weight.shape == (16, 256, 1, 1)
    assert_princeton(model, loaded)


@pytest.mark.parametrize("prefix", ["", "module.", "model.module.", "model.module._orig_mod."])
def test_princeton_file_of_the_training_script(tmp_path: Path, prefix: str) -> None:
    model = princeton()
    training = {
        "epoch": 46,
        "state_dict": {prefix + name: value for name, value in model.state_dict().items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]},
    }
    torch.save(training, tmp_path / "checkpoint.pt")
    assert_princeton(model, load_checkpoint(tmp_path / "checkpoint.pt"))


def test_princeton_without_the_unused_and_the_counters() -> None:
    model = princeton()
    state = {
        name: value
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
        and ("skip_layer" not in name or is_needed(model, name))
    }
    assert_princeton(model, load_checkpoint(state))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("pre.1.skip_layer.conv.weight", r"missing \(first: pre\.1\.skip_layer\.conv\.weight\)"),
        ("hgs.1.0.low2.up1.conv2.conv.bias", r"missing \(first: hgs\.1\.0\.low2\.up1\.conv2"),
        ("merge_preds.0.conv.conv.weight", r"1 missing \(first: merge_preds\.0"),
    ],
)
def test_princeton_incomplete(lost: str, message: str) -> None:
    state = princeton().state_dict()
    del state[lost]
    with pytest.raises(ValueError, match=message):
        load_checkpoint(state)


def test_princeton_that_widens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"low1\..* has shape|missing|unexpected"):
        load_checkpoint(princeton(increase=8))


def test_princeton_with_a_stem_of_other_widths_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pre\.0\.conv\.weight has shape \(64, 3, 7, 7\)"):
        load_checkpoint(PoseNet(1, 32, 5, 2))


@pytest.mark.parametrize("stem", ["paper", "bearpaw"])
@pytest.mark.parametrize("depth", [1, 4])
def test_own_layout(stem: str, depth: int) -> None:
    model = randomised(hourglass(3, 16, 2, depth, 7, stem))
    loaded = load_checkpoint(model)
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        for given, expected in zip(loaded(image), model(image), strict=True):
            assert torch.equal(given, expected)


def test_is_in_eval_mode_float32_and_trainable_with_memory_of_its_own() -> None:
    state = {
        name: value.half() if value.is_floating_point() else value
        for name, value in bearpaw_state().items()
    }
    model = load_checkpoint(state)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    before = model.stem.conv.bias.clone()
    state["conv1.bias"].zero_()
    assert torch.equal(model.stem.conv.bias, before)
    assert before.abs().sum() > 0


def test_loading_draws_no_random_numbers() -> None:
    state = bearpaw_state()
    before = torch.get_rng_state()
    load_checkpoint(state)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.module."]
)
def test_prefixes(prefix: str) -> None:
    state = bearpaw_state()
    assert_same_weights(load_checkpoint({prefix + name: v for name, v in state.items()}), state)


def test_prefix_of_a_compiled_part() -> None:
    state = bearpaw_state()
    compiled = {name.replace("hg.1.", "hg.1._orig_mod."): v for name, v in state.items()}
    assert_same_weights(load_checkpoint(compiled), state)


def test_checkpoint_without_batch_counters() -> None:
    state = bearpaw_state()
    old = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    assert_same_weights(load_checkpoint(old), state)


def test_module_in_data_parallel() -> None:
    model = randomised(hourglass(**SIZES, stem="bearpaw"))
    loaded = load_checkpoint(nn.DataParallel(model))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".pt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_file_of_a_training_script(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state = bearpaw_state()
    path = tmp_path / f"checkpoint{suffix}"
    training = {
        "epoch": 240,
        "arch": "hg",
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "best_acc": np.float64(0.8695),
        "losses": [np.float32(0.5), np.int64(3), np.bool_(True)],
        "optimizer": {"state": {}, "param_groups": [{"lr": 2.5e-4}]},
    }
    torch.save(training, path, _use_new_zipfile_serialization=zipped)
    assert_same_weights(load_checkpoint(path), state)
    assert_same_weights(load_checkpoint(str(path)), state)


def numpy_scalar_of_another_age(module: bytes, text: bytes) -> bytes:
    """A pickled np.float64(1.0) as other versions of NumPy and Python wrote it."""
    dtype = (
        b"cnumpy\ndtype\n(U\x02f8K\x00K\x01tR(K\x03U\x01<NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\x00tb"
    )
    return (
        b"\x80\x02c" + module + b"\nscalar\n(" + dtype + b"U" + bytes([len(text)]) + text + b"tR."
    )


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_scalars_written_by_old_versions(
    tmp_path: Path, module: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalar = numpy_scalar_of_another_age(module, np.float64(0.8695).tobytes())
    state = bearpaw_state()
    path = tmp_path / "old.pth.tar"
    torch.save(
        {"best_acc": "PLACEHOLDER", "state_dict": state}, path, _use_new_zipfile_serialization=False
    )
    # The pickle of the string (opcode X, its length, itself, memoised) becomes the scalar.
    content = path.read_bytes()
    text = b"X\x0b\x00\x00\x00PLACEHOLDER"
    assert content.count(text) == 1
    path.write_bytes(content.replace(text, scalar[2:-1]))
    assert_same_weights(load_checkpoint(path), state)


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = bearpaw_state()
    safetensors.save_file(state, tmp_path / "hourglass.safetensors")
    assert_same_weights(load_checkpoint(tmp_path / "hourglass.safetensors"), state)


def test_damaged_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(b"not safe at all")
    with pytest.raises(ValueError, match=r"damaged\.safetensors is not a safetensors file"):
        load_checkpoint(path)


class RunsCode:
    """Pickles to a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    proof = tmp_path / "proof"
    evil = {"state_dict": bearpaw_state(), "best_acc": RunsCode(os.mkdir, str(proof))}
    path = tmp_path / "evil.pth"
    torch.save(evil, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth refused: .* run code \(posix\.mkdir\)"):
        load_checkpoint(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file does what it threatens
    assert proof.exists()


def test_numpy_is_not_a_way_around_the_refusal(tmp_path: Path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"best_acc": RunsCode(np.fromstring, "1 2", np.float64, -1, " ")}, path)
    with pytest.raises(ValueError, match="refused"):
        load_checkpoint(path)


def test_allowing_numpy_scalars_ends_with_the_call(tmp_path: Path) -> None:
    before = set(torch.serialization.get_safe_globals())  # kept in no order
    path = tmp_path / "plain.pth"
    torch.save(bearpaw_state(), path)
    load_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before


def test_whole_saved_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "module.pth"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 1)), path)
    with pytest.raises(ValueError, match=r"refused: .*Sequential.* pass its state_dict"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", b"\x80\x04}.", random.Random(0).randbytes(4096), b"PK\x03\x04" + b"\0" * 60],
    ids=["empty", "text", "empty dict", "noise", "zip"],
)
def test_file_that_is_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_checkpoint(path)


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "short.pth"
    torch.save(bearpaw_state(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


def test_absent_file() -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint("no/such/file.pth")


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="got int"):
        load_checkpoint(3)  # type: ignore[arg-type]


def test_file_without_weights(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, [torch.zeros(1)]):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match="a state_dict was expected"):
            load_checkpoint(tmp_path / "odd.pth")


def test_wrong_network_names_first_missing_and_first_unexpected() -> None:
    with pytest.raises(
        ValueError,
        match=r"^Sequential is not .* missing \(first: conv1\.weight\) and 2 unexpected "
        r"\(first: 0\.weight\)",
    ):
        load_checkpoint(nn.Sequential(nn.Conv2d(3, 4, 1)))


def test_incomplete_checkpoint_names_what_is_missing() -> None:
    state = bearpaw_state()
    del state["fc_.0.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(first: fc_\.0\.bias\), when read as"):
        load_checkpoint(state)


def test_surplus_weight_is_named() -> None:
    state = bearpaw_state()
    state["score.0.scale"] = torch.ones(())
    with pytest.raises(ValueError, match=r"1 unexpected \(first: score\.0\.scale\), when read as"):
        load_checkpoint(state)


def test_group_norm_twin_is_named() -> None:
    state = {name: v for name, v in bearpaw_state().items() if "running" not in name}
    with pytest.raises(ValueError, match=r"missing \(first: bn1\.running_mean\)"):
        load_checkpoint(state)


def test_wrong_shape_is_named() -> None:
    state = bearpaw_state()
    state["layer1.0.conv2.weight"] = torch.zeros(4, 4, 1, 1)
    with pytest.raises(
        ValueError,
        match=r"layer1\.0\.conv2\.weight has shape \(4, 4, 1, 1\), expected \(4, 4, 3, 3\)",
    ):
        load_checkpoint(state)


@pytest.mark.parametrize("shape", [(), (5,), (0, 0, 1, 1), (5, 6, 1, 1)])
def test_odd_head_is_an_ordinary_error(shape: tuple[int, ...]) -> None:
    state = bearpaw_state()
    state["score.0.weight"] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"expected|missing"):
        load_checkpoint(state)
