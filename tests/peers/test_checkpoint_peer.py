"""load_checkpoint against the public implementation whose checkpoints it reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hgfast.models import load_checkpoint

peer = pytest.importorskip(
    "stacked_hourglass",
    reason="needs the peer: pip install --no-deps pytorch-stacked-hourglass==1.0.0a9 "
    "&& pip install importlib_resources scipy tabulate",
)


@pytest.mark.parametrize(("name", "stacks"), [("hg1", 1), ("hg2", 2), ("hg8", 8)])
def test_same_weights_same_heatmaps(name: str, stacks: int) -> None:
    model: nn.Module = getattr(peer, name)(pretrained=False)
    generator = torch.Generator().manual_seed(stacks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for shift in (module.running_mean, module.bias):
                shift.data.normal_(0, 0.3, generator=generator)
            for scale in (module.running_var, module.weight):
                scale.data.uniform_(0.5, 1.5, generator=generator)
    model.eval()
    image = torch.rand(1, 3, 128, 64, generator=generator)
    with torch.inference_mode():
        expected = model(image)
        given = load_checkpoint(nn.DataParallel(model))(image)
    assert len(given) == len(expected) == stacks
    for heatmap, reference in zip(given, expected, strict=True):
        assert reference.abs().max() > 0.1
        torch.testing.assert_close(heatmap, reference, rtol=1e-5, atol=1e-5)
