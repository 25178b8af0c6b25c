"""The demo: its network, its pictures, its command line, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import hgfast
from hgfast._timing import time_alternately
from hgfast.demo import photos, train
from hgfast.demo.common import SHIPPED, DemoError
from hgfast.demo.evaluation import correct, held_out, pck, predict, to_input, to_pixels
from hgfast.demo.figures import OCCLUDED, OUTSIDE, VISIBLE, render, render_many
from hgfast.demo.skeleton import JOINTS
from hgfast.viz import SIDES, Row, draw_skeleton, heatmap_overlay, pose_page

TRAINED = json.loads(SHIPPED.with_suffix(".json").read_text())


def demo(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """``python -m hgfast demo`` as a process of its own, run in ``folder``."""
    root = Path(hgfast.__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, "-m", "hgfast", "demo", *map(str, arguments)],
        cwd=folder,
        # One thread: what is timed here is nobody's number, and a busy machine stays usable.
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def shipped():
    return hgfast.models.load_checkpoint(SHIPPED)


# --- the shipped network ----------------------------------------------------------------------


def test_shipped_weights_are_small_and_described(shipped):
    assert SHIPPED.stat().st_size <= 3 * 2**20
    assert TRAINED["parameters"] == sum(p.numel() for p in shipped.parameters())
    assert len(shipped.heads) == TRAINED["recipe"]["stacks"]
    # The recipe that is written down is the one that the command runs.
    assert TRAINED["recipe"] == vars(train.Recipe())


def test_shipped_network_finds_nine_in_ten_joints(shipped):
    """On held-out figures other than those the recorded score is of, before and after."""
    seeds = held_out(200, start=500_000)
    assert max(seeds) < train.training_seed(0, 0)
    images, joints, visible = render_many(seeds)
    eager = pck(predict(shipped, images)[0], joints, visible)
    fast = pck(predict(hgfast.optimize(shipped, precision="highest"), images)[0], joints, visible)
    assert eager >= 0.9
    assert fast == pytest.approx(eager, abs=1e-3)
    assert eager == pytest.approx(TRAINED["held out"]["pck@0.2"], abs=0.03)


def test_shipped_network_sees_nothing_in_an_empty_picture(shipped):
    empty = np.full((1, 128, 128, 3), 127, np.uint8)
    figure = render(held_out(1)[0]).image[None]
    assert predict(shipped, empty)[1].mean() < 0.5 * predict(shipped, figure)[1].mean()


# --- measures ---------------------------------------------------------------------------------


def test_pck_by_hand():
    joints = np.zeros((1, 16, 2), np.float32)
    joints[0, 13] = (30, 40)  # left shoulder; the right hip is at (0, 0): a torso of 50
    moved = joints.copy()
    moved[0, 0] = (10, 0)  # exactly 0.2 torsos off: found
    moved[0, 1] = (10.01, 0)  # just beyond
    moved[0, 4] = (0, -80)  # far off, but outside the image: does not count
    visible = np.full((1, 16), VISIBLE, np.uint8)
    visible[0, 4], visible[0, 1] = OUTSIDE, OCCLUDED
    found = correct(moved, joints)
    assert list(np.flatnonzero(~found[0])) == [1, 4]
    assert pck(moved, joints, visible) == pytest.approx(14 / 15)
    assert pck(moved, joints, visible, threshold=0.3) == 1


def test_heatmap_cells_and_pixels_share_their_centres():
    cells = torch.tensor([[0.0, 0.0], [31.0, 31.0], [15.5, 15.5]])
    expected = torch.tensor([[1.5, 1.5], [125.5, 125.5], [63.5, 63.5]])
    assert torch.equal(to_pixels(cells, 32, 128), expected)


def test_targets_decode_to_their_joints():
    """Gaussians drawn by the training script lead back to the joints they were drawn for."""
    _, joints, visible = render_many(held_out(16))
    maps = train.targets(joints, visible, 32, sigma=1.5)
    coords, scores = hgfast.decode(maps)
    assert maps.shape == (16, 16, 32, 32)
    assert (scores[torch.from_numpy(visible == OUTSIDE)] == 0).all()
    inside = (visible != OUTSIDE) & ((joints > 8) & (joints < 119)).all(-1)
    error = np.linalg.norm(to_pixels(coords, 32, 128).numpy() - joints, axis=-1)
    # The quarter offset leaves at most a quarter of a cell, a pixel, in each direction.
    assert error[inside].max() <= np.hypot(1, 1) + 0.01


def test_input_is_normalised_with_the_mean_of_mpii():
    x = to_input(np.array([[[[255, 0, 51]]]], np.uint8))
    assert x.flatten().tolist() == pytest.approx([1 - 0.4404, -0.4440, 0.2 - 0.4327])


def test_timing_takes_turns_and_drops_first_calls():
    order = []
    times = time_alternately(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, calls=4, drop=3
    )
    assert "".join(order) == "aaaabbbb" * 2
    assert set(times) == {"a", "b"}
    assert all(ms >= 0 for ms in times.values())
    with pytest.raises(ValueError, match="calls > drop"):
        time_alternately({}, 1, calls=3, drop=3)


# --- training ---------------------------------------------------------------------------------


def test_two_steps_of_training_write_a_network(tmp_path):
    out = tmp_path / "weights.safetensors"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "hgfast.demo.train",
            "--steps",
            "2",
            "--workers",
            "1",
            "--held-out",
            "8",
            "--out",
            str(out),
        ],
        cwd=Path(hgfast.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trained = hgfast.models.load_checkpoint(out)
    assert load_file(out).keys() == load_file(SHIPPED).keys()
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["recipe"]["steps"] == 2
    assert 0 <= record["held out"]["pck@0.2"] <= 1
    with torch.inference_mode():
        assert trained(torch.zeros(1, 3, 128, 128))[-1].shape == (1, 16, 32, 32)


def test_memory_is_reproducible_and_flips_labels_with_pictures():
    """Two runs see the same batches, and every batch's joints lie on its pictures' people."""
    recipe = train.Recipe(batch=8, fresh=4, memory=64)
    figures = render_many([train.training_seed(0, i) for i in range(64)])

    def stream():
        while True:
            yield figures

    batches = []
    for _ in range(2):
        memory, rng = train.Memory(recipe, stream()), np.random.default_rng(1)
        batches.append([memory.batch(rng) for _ in range(3)])
    for one, other in zip(*batches, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    originals = {image.tobytes(): i for i, image in enumerate(figures[0])}
    mirrored = {image[:, ::-1].tobytes(): i for i, image in enumerate(figures[0])}
    kinds = set()
    for images, joints, _ in batches[0]:
        for image, points in zip(images, joints, strict=True):
            if image.tobytes() in originals:
                kinds.add("as it was")
                assert np.array_equal(points, figures[1][originals[image.tobytes()]])
            else:
                kinds.add("mirrored")
                source = figures[1][mirrored[image.tobytes()]]
                assert points[10] == pytest.approx([127 - source[15, 0], source[15, 1]])
    assert kinds == {"as it was", "mirrored"}


def test_foreground_counts_more():
    goal = torch.tensor([[[[1.0, 0.0]]]])
    missed = train.loss_of(torch.zeros_like(goal), goal, foreground=10)
    invented = train.loss_of(torch.ones_like(goal), goal, foreground=10)
    assert (float(missed), float(invented)) == (11, 1)


# --- drawing ----------------------------------------------------------------------------------


def pose() -> np.ndarray:
    return render(held_out(1)[0]).joints


def test_skeleton_is_drawn_on_its_joints_in_the_colours_of_its_sides():
    joints = np.full((16, 2), 50.0)
    joints[[12, 11, 10]] = [(20, 30), (20, 50), (20, 70)]  # the right arm
    joints[[13, 14, 15]] = [(80, 30), (80, 50), (80, 70)]
    blank = np.zeros((100, 100, 3), np.uint8)
    drawn = np.asarray(draw_skeleton(blank, joints, width=4))
    assert tuple(drawn[40, 20]) == pytest.approx(SIDES["right"], abs=8)
    assert tuple(drawn[40, 80]) == pytest.approx(SIDES["left"], abs=8)
    assert not blank.any()  # the given image is left as it is
    shown = np.ones(16, bool)
    shown[11] = False
    without = np.asarray(draw_skeleton(blank, joints, shown=shown, width=4))
    assert not without[40, 20].any()
    assert without[40, 80].any()
    sure = np.ones(16, bool)
    sure[10] = False
    hollow = np.asarray(draw_skeleton(blank, joints, sure=sure, width=4))
    assert not np.array_equal(hollow[70, 20], drawn[70, 20])


def test_heatmap_glows_where_it_is_high():
    image = np.full((64, 64, 3), 100, np.uint8)
    maps = np.zeros((16, 16, 16), np.float32)
    maps[15, 4, 12] = 1  # the left wrist, at pixel (49.5, 17.5)
    glow = np.asarray(heatmap_overlay(image, maps)).astype(int)
    assert glow[17, 49].sum() > glow[40, 10].sum() + 200
    assert glow[40, 10].sum() < image[40, 10].sum()  # the rest is dimmed
    maps[15] = np.nan
    assert np.asarray(heatmap_overlay(image, maps)).std() < 1


def test_drawing_refuses_what_it_cannot_draw():
    image = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"\(K, 2\) with K >= 16, got \(3, 2\)"):
        draw_skeleton(image, np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"heatmaps \(K, h, w\), got shape \(4, 4\)"):
        heatmap_overlay(image, np.zeros((4, 4)))
    with pytest.raises(ValueError, match="at least one picture"):
        pose_page("empty", [])


def test_page_holds_its_pictures():
    red = Image.new("RGB", (40, 80), (200, 0, 0))
    page = np.asarray(pose_page("title", [Row("label", [red], ["caption"])], cell=100))
    share = (page == (200, 0, 0)).all(-1).sum()
    assert 0.8 * 50 * 100 < share <= 50 * 100  # fitted into the cell, corners rounded


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (None, (50, 0, 250, 200)),
        ((10, 20, 30, 60), (-5, 20, 55, 80)),
        ((10, 20, 60, 30), (10, 5, 70, 65)),
    ],
)
def test_crops_are_squares(box, expected):
    assert photos.square_box((300, 200), box) == expected


@pytest.mark.parametrize("box", [(0, 0, 0, 10), (400, 0, 10, 10), (0, 0, 10, -1)])
def test_boxes_off_the_photo_are_refused(box):
    with pytest.raises(DemoError, match="not inside an image of 300 x 200 pixels"):
        photos.square_box((300, 200), box)


def test_demo_runs_offline_and_draws(tmp_path):
    done = demo("--quick", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("eager", "channels_last", 'hgfast "highest"', 'hgfast "medium"', "PCK@0.2", "ok"):
        assert word in done.stdout
    assert "FAILED" not in done.stdout
    assert "blocks replaced" in done.stdout
    with Image.open(tmp_path / "hgfast-demo" / "figures.png") as picture:
        assert min(picture.size) > 500
        colours = np.asarray(picture.convert("RGB").resize((200, 150))).reshape(-1, 3)
        assert len(np.unique(colours, axis=0)) > 5000


def test_demo_draws_in_a_photos_own_coordinates(tmp_path):
    """A figure pasted into a larger photo is found there, at its place and scale."""
    seed = held_out(1, start=2025)[0]
    figure = render(seed, 256)
    photo = Image.new("RGB", (700, 500), (90, 110, 120))
    photo.paste(Image.fromarray(figure.image), (300, 150))
    photo.save(tmp_path / "photo.png")
    done = demo("photo.png", "--box", 300, 150, 256, 256, "--out", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained on rendered figures only" in done.stdout
    assert (tmp_path / "out" / "photo-pose.png").exists()
    rows = {
        cells[0]: cells[1:]
        for line in done.stdout.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("│┃ ").split("│")]) == 4
    }
    truth = figure.joints + np.array([300, 150])
    torso = np.linalg.norm(truth[13] - truth[2])
    near = [
        np.hypot(float(x) - truth[k, 0], float(y) - truth[k, 1]) <= 0.2 * torso
        for k, name in enumerate(JOINTS)
        for x, y, _ in [rows[name]]
        if x != "-"
    ]
    assert sum(near) >= 12


class Bystander(nn.Module):
    """No hourglass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "no such image: missing.png"),
        (["text.png"], "not an image: text.png"),
        (["--weights", "missing.pth"], "no such weights file: missing.pth"),
        (["--weights", "text.png"], "text.png is not a"),
        (["--weights", "other.pth"], "other.pth is not a stacked hourglass"),
        (["--stacks", "8"], "has 1 stack, --stacks says 8"),
        (["photo.png", "--box", "900", "0", "5", "5"], "not inside an image of 64 x 64 pixels"),
        (["--weights", "hand.pth"], "hand.pth predicts 21 joints; the demo draws MPII's 16"),
        (["--out", "text.png"], "cannot make the folder text.png"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capfd):
    (tmp_path / "text.png").write_text("this is no picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    torch.save(Bystander().state_dict(), tmp_path / "other.pth")
    hand = hgfast.models.hourglass(stacks=1, features=8, depth=1, joints=21)
    torch.save(hand.state_dict(), tmp_path / "hand.pth")
    monkeypatch.chdir(tmp_path)
    from hgfast.cli import main

    assert main(["demo", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.startswith("hgfast demo: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_bad_input_leaves_a_process_with_status_2(tmp_path):
    done = demo("missing.png", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["hgfast demo: error: no such image: missing.png"]
    assert not (tmp_path / "hgfast-demo").exists()
