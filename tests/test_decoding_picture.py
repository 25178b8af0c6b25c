"""The picture of docs/decoding.md: made by one command, and it shows what decode returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgfast.decoding import METHODS
from hgfast.demo import decoding

COMMITTED = Path(__file__).parents[1] / "docs" / "decoding.png"


@pytest.mark.usefixtures("backend")
def test_the_picture_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "decoding.png"
    assert decoding.main([str(file)]) == 0
    with Image.open(file) as made, Image.open(COMMITTED) as committed:
        assert made.size == committed.size
        difference = np.asarray(made, np.float32) - np.asarray(committed, np.float32)
    # Fonts and rounding differ between versions of matplotlib, what is shown does not.
    assert np.abs(difference).mean() < 8


def test_every_method_has_a_marker_where_it_decodes() -> None:
    shown = [names for names, *_ in decoding._SHOWN]
    assert sorted(name for names in shown for name in names) == sorted(METHODS)
    places = decoding.places(decoding.heatmap())
    for names in shown:
        for name in names:  # those that share a marker agree
            np.testing.assert_array_equal(places[name], places[names[0]])
    # As the picture and docs/decoding.md say.
    np.testing.assert_array_equal(places["newell"], places["quarter"] + 0.5)
    assert places["argmax"].tolist() == [12, 8]
    np.testing.assert_allclose(places["dark"], [11.53, 7.68], atol=0.01)
