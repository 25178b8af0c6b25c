"""The demo's rendered figures: reproducible, and truly labelled."""

import numpy as np
import pytest

from hgfast.demo import figures
from hgfast.demo.figures import OCCLUDED, OUTSIDE, VISIBLE, mirror, render, training_seed
from hgfast.demo.skeleton import BONES, JOINTS, MIRROR

SEEDS = range(40)


@pytest.fixture(scope="module")
def rendered():
    return [render(seed) for seed in SEEDS]


def test_a_seed_is_a_figure():
    first, again, other = render(7), render(7), render(8)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.joints, again.joints)
    assert np.array_equal(first.visible, again.visible)
    assert not np.array_equal(first.image, other.image)
    assert not np.array_equal(first.joints, other.joints)


def test_shapes_and_dtypes(rendered):
    for figure in rendered:
        assert figure.image.shape == (128, 128, 3)
        assert figure.image.dtype == np.uint8
        assert figure.joints.shape == (16, 2)
        assert figure.joints.dtype == np.float32
        assert figure.mask.shape == (128, 128)
        assert set(np.unique(figure.visible)) <= {OUTSIDE, OCCLUDED, VISIBLE}


def test_outside_means_outside(rendered):
    for figure in rendered:
        pixel = np.rint(figure.joints)
        inside = ((pixel >= 0) & (pixel < 128)).all(1)
        # Half a pixel of rounding may go either way at the very border.
        near = (np.abs(figure.joints - 63.5) > 63).any(1)
        agrees = (figure.visible != OUTSIDE) == inside
        assert (agrees | near).all()


def test_figures_are_varied(rendered):
    visible = np.stack([figure.visible for figure in rendered])
    assert (visible == VISIBLE).mean() > 0.6
    assert (visible == OCCLUDED).mean() > 0.03
    assert (visible == OUTSIDE).any()
    wrists = np.stack([figure.joints[10] for figure in rendered])
    assert (wrists.std(0) > 12).all()


def test_visible_joints_lie_on_the_person(rendered):
    for figure in rendered:
        for x, y in np.rint(figure.joints[figure.visible == VISIBLE]).astype(int):
            # The head top is on the outline, ankles and wrists may be grazed by an edge.
            around = figure.mask[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
            assert around.any()


def test_limbs_are_painted_between_their_joints(rendered):
    """Between two visible joints of a limb the picture shows the person almost always."""
    on_person = []
    for figure in rendered:
        for a, b, _ in BONES:
            if figure.visible[a] == VISIBLE and figure.visible[b] == VISIBLE:
                middle = np.rint((figure.joints[a] + figure.joints[b]) / 2).astype(int)
                on_person.append(figure.mask[middle[1], middle[0]])
    assert np.mean(on_person) > 0.97


def test_a_hand_has_the_colour_of_skin(monkeypatch):
    """The painted pixels at visible wrists change with the skin, and so belong to the hand."""
    clear = np.mean  # readability of the comparison below
    changes = []
    for seed in range(12):
        rng_free = render(seed)
        monkeypatch.setattr(figures, "_SKIN", ("#00ff00",) * 8)
        green = render(seed)
        monkeypatch.undo()
        assert np.array_equal(rng_free.joints, green.joints)
        for joint in (10, 15):
            if rng_free.visible[joint] == VISIBLE:
                x, y = np.rint(green.joints[joint]).astype(int)
                patch = green.image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].astype(int)
                changes.append(clear(patch[..., 1] - patch[..., [0, 2]].max(-1)) > 20)
    assert len(changes) >= 10
    assert np.mean(changes) > 0.8


def test_left_and_right_are_the_persons_own(rendered):
    """Facing the camera the right hip is on the picture's left; seen from behind, right."""
    sides = [figure.joints[3, 0] - figure.joints[2, 0] for figure in rendered]
    assert np.sum(np.array(sides) > 0) > np.sum(np.array(sides) < 0) > 0


def test_mirror_swaps_names_and_places(rendered):
    for figure in rendered[:8]:
        flipped = mirror(figure)
        assert np.array_equal(flipped.image, figure.image[:, ::-1])
        right_wrist, left_wrist = JOINTS.index("right wrist"), JOINTS.index("left wrist")
        assert flipped.joints[left_wrist, 0] == pytest.approx(127 - figure.joints[right_wrist, 0])
        assert flipped.joints[left_wrist, 1] == figure.joints[right_wrist, 1]
        assert flipped.visible[left_wrist] == figure.visible[right_wrist]
        twice = mirror(flipped)
        assert np.array_equal(twice.image, figure.image)
        assert np.allclose(twice.joints, figure.joints, atol=1e-4)
        assert np.array_equal(twice.visible, figure.visible)


def test_mirror_table_is_an_involution_that_swaps_sides():
    for joint, other in enumerate(MIRROR):
        assert MIRROR[other] == joint
        swapped = JOINTS[joint].replace("right", "?").replace("left", "right").replace("?", "left")
        assert JOINTS[other] == swapped


@pytest.mark.parametrize("seed", [3, 11])
def test_a_scene_is_the_same_at_any_size(seed):
    small, large = render(seed, 128), render(seed, 256)
    assert np.allclose((small.joints + 0.5) * 2, large.joints + 0.5, atol=1e-3)
    reduced = large.image.reshape(128, 2, 128, 2, 3).mean((1, 3))
    assert np.abs(reduced - small.image).mean() < 12


def test_training_never_draws_a_held_out_seed():
    assert training_seed(0, 0) not in figures.HELD_OUT
    assert training_seed(0, 0) < training_seed(0, 10**9 - 1) < training_seed(1, 0)


@pytest.mark.parametrize(("seed", "size"), [(-1, 128), (0, 8)])
def test_bad_arguments_are_named(seed, size):
    with pytest.raises(ValueError, match=f"seed {seed} and size {size}"):
        render(seed, size)
