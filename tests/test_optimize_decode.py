"""optimize(model, decode=...): keypoints straight from the network."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from networks import Foreign, Plain, image, small_hourglass
from torch import Tensor, nn

import hgfast
from hgfast import _native
from hgfast import region as region_module
from hgfast.optimization import decode_of
from hgfast.region import regions_of

pytestmark = pytest.mark.skipif(_native.load() is None, reason=str(_native.reason))


@pytest.fixture(autouse=True)
def _no_silent_fallback() -> Iterator[None]:
    """A warning is an error, so that no test passes because eager ran unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", hgfast.HgfastWarning)
        yield


class Wrapped(nn.Module):
    """A network whose output is put into a container."""

    def __init__(self, pack: Any) -> None:
        super().__init__()
        self.network = small_hourglass(stacks=2)
        self._pack = [pack]

    def forward(self, x: Tensor) -> Any:
        return self._pack[0](self.network(x))


class Last(nn.Module):
    def forward(self, stacks: list[Tensor]) -> Tensor:
        return stacks[-1].sin()


def run(model: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode():
        return model(x)


def assert_equal(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("method", hgfast.decoding.METHODS)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_it_decodes_what_the_network_would_return(method: str, precision: str) -> None:
    model = small_hourglass(stacks=2)
    x = image(2, 64, 96)
    heatmaps = run(hgfast.optimize(model, precision), x)
    keypoints = hgfast.optimize(model, precision, decode=method)
    coords, scores = run(keypoints, x)
    # "medium" computes in bfloat16, which float32 outputs hold exactly.
    assert_equal((coords, scores), hgfast.decode(heatmaps, method))
    assert coords.shape == (2, 5, 2)
    verification = hgfast.verify(model, keypoints, x)
    assert verification.ok, str(verification)
    assert "Coords and scores against what the reference decodes" in str(verification)
    assert [output.name for output in verification.outputs] == [
        "['heatmaps']", "['coords']", "['scores']",
    ]  # fmt: skip


def test_bfloat16_models() -> None:
    model = small_hourglass(stacks=2).bfloat16()
    x = image().bfloat16()
    fast = hgfast.optimize(model, decode="quarter")
    assert_equal(run(fast, x), hgfast.decode(run(hgfast.optimize(model), x)))
    assert hgfast.verify(model, fast, x).ok


def test_heatmaps_stay_in_the_kernels_dtype_and_layout() -> None:
    fast = hgfast.optimize(small_hourglass(stacks=2), "medium", decode="quarter")
    (region,) = regions_of(fast)
    with torch.inference_mode():
        heatmaps, keypoints = region.both(image())
    assert heatmaps.dtype == torch.bfloat16
    assert heatmaps.is_contiguous(memory_format=torch.channels_last)
    assert_equal(keypoints, hgfast.decode(heatmaps))


def test_outputs_that_nobody_asks_for_are_not_computed() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small_hourglass().hourglasses[0]
            self.first, self.second = nn.Conv2d(32, 7, 1), nn.Conv2d(32, 5, 1)

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.body(x)
            return [self.first(y), self.second(y)]

    model = TwoHeads().eval()
    steps = {s.name for r in regions_of(hgfast.optimize(model)) for s, _ in r.paths()}
    fast = hgfast.optimize(model, decode="argmax")
    asked = {s.name for r in regions_of(fast) for s, _ in r.paths()}
    assert steps - asked == {"first"}
    x = torch.randn(1, 32, 16, 16, generator=torch.Generator().manual_seed(0))
    coords, scores = run(fast, x)
    assert coords.shape == (1, 5, 2)
    torch.testing.assert_close(scores, run(model, x)[-1].amax((2, 3)), rtol=1e-5, atol=1e-5)


def test_options_and_several_peaks() -> None:
    model, x = small_hourglass(), image()
    heatmaps = run(hgfast.optimize(model), x)
    topk = hgfast.TopK(3, window=5)
    fast = hgfast.optimize(model, decode={"method": "dark", "blur": 17, "topk": topk})
    assert_equal(run(fast, x), hgfast.decode(heatmaps, "dark", topk=topk, blur=17))
    assert hgfast.verify(model, fast, x).ok
    fast = hgfast.optimize(model, decode={"topk": hgfast.GlobalTopK(4)})
    assert_equal(run(fast, x), hgfast.decode(heatmaps, topk=hgfast.GlobalTopK(4)))
    assert hgfast.verify(model, fast, x).ok


def test_a_model_that_is_not_replaced_as_a_whole() -> None:
    model = Foreign().eval()
    x = torch.randn(2, 16, 12, 10, generator=torch.Generator().manual_seed(0))
    fast = hgfast.optimize(model, decode="msra")
    assert len(regions_of(fast)) == 2
    assert_equal(run(fast, x), hgfast.decode(run(hgfast.optimize(model), x), "msra"))
    assert hgfast.verify(model, fast, x).ok


def test_a_model_in_which_nothing_is_replaced() -> None:
    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing"):
        fast = hgfast.optimize(Plain().eval(), decode="quarter")
    assert_equal(
        run(fast, image()), hgfast.decode(run(hgfast.restore(copy.deepcopy(fast)), image()))
    )


def test_disabled_it_still_returns_keypoints(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small_hourglass(stacks=2), image()
    expected = hgfast.decode(run(model, x))
    fast = hgfast.optimize(model, decode="quarter")
    monkeypatch.setenv("HGFAST_DISABLE", "1")
    with pytest.warns(hgfast.HgfastWarning, match="HGFAST_DISABLE"):
        assert_equal(run(fast, x), expected)
    assert_equal(run(hgfast.optimize(model, decode="quarter"), x), expected)


def test_where_eager_runs_it_decodes_too() -> None:
    model, x = small_hourglass(stacks=2), image()
    fast = hgfast.optimize(model, decode="quarter")
    fast.train()
    with pytest.warns(hgfast.HgfastWarning, match="training"):
        coords, scores = fast(x)
    assert coords.shape == (1, 5, 2)
    assert not scores.requires_grad


def test_under_torch_compile() -> None:
    x = image()
    fast = hgfast.optimize(small_hourglass(), decode="quarter")
    compiled = torch.compile(fast, backend="eager")
    assert_equal(run(compiled, x), run(fast, x))


def test_restore_copies_and_pickles() -> None:
    model, x = small_hourglass(stacks=2), image()
    fast = hgfast.optimize(model, decode="newell")
    expected = run(fast, x)
    assert_equal(run(copy.deepcopy(fast), x), expected)
    stream = io.BytesIO()
    pickle.dump(fast, stream)
    stream.seek(0)
    assert_equal(run(pickle.load(stream), x), expected)
    assert isinstance(run(hgfast.restore(fast), x), list)
    assert decode_of(fast) is None
    plain = hgfast.optimize(Foreign().eval(), decode="newell")
    assert isinstance(run(hgfast.restore(plain), torch.zeros(1, 16, 8, 8)), Tensor)


def test_optimised_again_it_follows_the_last_wish() -> None:
    model, x = small_hourglass(stacks=2), image()
    fast = hgfast.optimize(model, decode="quarter")
    assert isinstance(run(hgfast.optimize(fast), x), list)
    assert_equal(
        run(hgfast.optimize(fast, decode="dark"), x),
        hgfast.decode(run(hgfast.optimize(model), x), "dark"),
    )
    same = hgfast.optimize(fast, inplace=True, decode="quarter")
    assert same is fast


class Pipeline(nn.Module):
    """A network that decodes, and what was written for its keypoints."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        coords, scores = self.network(x)
        return 4 * coords * scores[..., None]


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_a_module_inside_that_decodes_goes_on_to_do_so(whole: bool, with_example: bool) -> None:
    x = image(2)
    network = small_hourglass(stacks=3)
    if not whole:
        network = nn.Sequential(network, Last()).eval()
    pipeline = Pipeline(hgfast.optimize(network, decode="quarter")).eval()
    expected = run(pipeline, x)
    fast = hgfast.optimize(pipeline, "medium", example=x if with_example else None)
    (region,) = regions_of(fast)
    assert region.name == ("network" if whole else "network.0")
    assert region.precision == "medium"
    torch.testing.assert_close(run(fast, x), expected, rtol=0.1, atol=0.1)
    with torch.inference_mode():
        heatmaps, keypoints = fast.network.__dict__["forward"].both(x)
    assert_equal(keypoints, hgfast.decode(heatmaps))
    with pytest.raises(ValueError, match="output is then float32"):  # as decode's results are
        hgfast.verify(pipeline, fast, x)


def test_where_it_raises_the_model_is_left_as_it_was() -> None:
    model = hgfast.optimize(Wrapped(lambda stacks: {"heatmaps": stacks}).eval())
    before, report = list(regions_of(model)), str(hgfast.report(model))
    assert before
    with pytest.raises(ValueError, match="cannot decode what Wrapped returns"):
        hgfast.optimize(model, inplace=True, decode="quarter")
    assert regions_of(model) == before
    assert str(hgfast.report(model)) == report
    assert decode_of(model) is None


class ChecksItsInput(nn.Module):
    """Cannot be traced symbolically."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_hourglass(stacks=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        assert not x.shape[2] % 32
        return self.network(x)


def test_what_needs_an_example_decodes_as_a_whole_and_so_do_its_copies() -> None:
    x = image()
    fast = hgfast.optimize(ChecksItsInput().eval(), example=x, decode="quarter")
    assert [region.name for region in regions_of(fast)] == [""]
    assert hgfast.report(fast).skipped == []
    twin = copy.deepcopy(fast)
    assert_equal(run(twin, x), run(fast, x))  # _no_silent_fallback: not eagerly
    assert "eager" not in {path for region in regions_of(twin) for _, path in region.paths()}


def test_changed_weights_are_followed() -> None:
    model, x = small_hourglass(stacks=2), image()
    fast = hgfast.optimize(model, decode="quarter")
    run(fast, x)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(0.9)
    assert_equal(
        run(fast, x), hgfast.decode(run(hgfast.optimize(hgfast.restore(copy.deepcopy(fast))), x))
    )


def test_the_report_says_so() -> None:
    fast = hgfast.optimize(small_hourglass(), decode="udp")
    report = hgfast.report(fast)
    assert report.decode == "udp"
    assert 'heatmaps decoded by "udp"' in str(report)
    assert hgfast.report(hgfast.optimize(small_hourglass())).decode is None


@pytest.mark.parametrize("wrong", ["a quarter too far", "a score too high", "NaN"])
def test_verify_notices_a_wrong_decoder(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = region_module.decode

    def broken(heatmaps: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        coords, scores = decode(heatmaps, **rest)
        if wrong == "NaN":
            return coords, torch.full_like(scores, torch.nan)
        return coords + 0.25 * (wrong == "a quarter too far"), scores + (
            wrong == "a score too high"
        )

    model = small_hourglass()
    fast = hgfast.optimize(model, decode="quarter")
    assert hgfast.verify(model, fast, image()).ok
    monkeypatch.setattr(region_module, "decode", broken)
    verification = hgfast.verify(model, fast, image())
    assert not verification.ok
    assert "not what the reference decodes" in str(verification)


def test_verify_notices_a_wrong_score_beside_an_infinite_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Infinite(Plain):
        def forward(self, x: Tensor) -> Tensor:
            maps = super().forward(x)
            return torch.cat((maps, torch.full_like(maps[:, :1], torch.inf)), 1)

    decode = region_module.decode

    def broken(heatmaps: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        coords, scores = decode(heatmaps, **rest)
        return coords, scores + 1

    model = Infinite().eval()
    with pytest.warns(hgfast.HgfastWarning, match="replaced nothing"):
        fast = hgfast.optimize(model, decode="quarter")
    assert hgfast.verify(model, fast, image()).ok
    monkeypatch.setattr(region_module, "decode", broken)
    verification = hgfast.verify(model, fast, image())
    assert [output.ok for output in verification.outputs] == [True, True, False]


def test_verify_notices_wrong_heatmaps() -> None:
    model = small_hourglass(stacks=2)
    fast = hgfast.optimize(model, decode="quarter")
    with torch.no_grad():
        next(reversed(list(fast.parameters()))).add_(0.1)
    verification = hgfast.verify(model, fast, image())
    assert [output.ok for output in verification.outputs] == [False, True, True]


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        ("halfway", "a method out of .*'halfway'"),
        ({"method": "dark", "blur": 10}, "odd blur"),
        ({"method": "megvii", "topk": 3}, "with topk, got 'megvii'"),
        (
            {"transform": None},
            "method, blur, beta, topk, got 'transform'; flip and transform change",
        ),
    ],
)
def test_wrong_wishes(decode: Any, message: str) -> None:
    model = small_hourglass()
    with pytest.raises(ValueError, match=message):
        hgfast.optimize(model, inplace=True, decode=decode)
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("wrong", [True, 3])
def test_neither_a_name_nor_keywords(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"keywords of hgfast.decode, got {type(wrong).__name__}"):
        hgfast.optimize(small_hourglass(), decode=wrong)


def test_outputs_that_are_no_heatmaps() -> None:
    model = Wrapped(lambda stacks: {"heatmaps": stacks}).eval()
    with pytest.raises(
        ValueError, match=r"cannot decode what Wrapped returns: .* a dict with 'heat"
    ):
        hgfast.optimize(model, decode="quarter")
    patched = small_hourglass()
    patched.forward = patched.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="a forward of its own"):
        hgfast.optimize(patched, decode="quarter")


def test_nested_lists_end_in_the_last() -> None:
    model = Wrapped(lambda stacks: (stacks[0], [stacks[1]])).eval()
    with pytest.raises(ValueError, match="a tuple that ends in a list that ends in a value"):
        hgfast.optimize(model, decode="quarter")
