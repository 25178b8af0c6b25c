"""The decoding kernels for GPUs, in Triton: heatmaps in, coordinates and scores out, in one launch.

What is computed stands in :mod:`hgfast.decoding.reference`: merging with the mirrored image's maps,
the maximum and its cell, one of nine refinements or the k highest peaks, the way into the image.

Layout: a program has JOINTS maps of one image and runs through tiles [JOINTS, BLOCK] of their
cells; whatever there is one of per map is a column [JOINTS, 1]. Where a map is contiguous JOINTS is
1, and neighbouring threads have neighbouring cells. Where joints are neighbours in memory
(channels_last, as networks here give them) it is as many as 32 bytes hold, a sector of memory.
Where their number is no multiple of that, as COCO's 17, programs share sectors, which come from
memory once and from the second-level cache again, and the last program of an image has lanes that
do nothing. Other strides work too, a map a program.

The argument is one of bytes. A map of 64x48 is 12 KiB in float32, and but for softmax and blur all
arithmetic on it is a comparison or two per cell: the floor is the time to read the maps once. So
memory is read once, by the search for the maximum, which asks for BLOCK cells (a contiguous map of
up to 4096 whole) before it looks at the first. What follows reads the surroundings of a cell, or
(megvii, softargmax, peaks) the map a second time, and finds them in a cache.

A blurred value is a sum along a column of sums along rows. Those are kept in ``plane``, scratch
memory for one value per cell: without it a blur over 11x11 takes 121 loads a cell from the cache,
with it 22 and a store. dark and udp fill of the plane what their window needs, less than a KiB of
15 rows; megvii fills it: a map more written, and read from the second-level cache. Shared memory,
which Triton does not let a program address, would save that.

Products and sums of the blur are rounded one by one in the reference's order, so that blurred
values have its bits. For that a launch needs enable_fp_fusion=False. And for the same reason
nothing is divided in float32, which Triton does approximately.
"""

import triton
import triton.language as tl

# ---- Reading -------------------------------------------------------------------------------------
#
# A ``view`` is what it takes to read maps: ``(maps, flipped, rows, columns, flipped rows, flipped
# columns, height, width, magic, own)``: pointers [JOINTS, 1] to the maps and to the mirrored
# image's; strides; the maps' size; the number of _row_of; which of the JOINTS there are. HOW tells
# how, as a sum of:

FLIP = tl.constexpr(1)  # there are maps of the mirrored image
SHIFT = tl.constexpr(2)  # they are moved one column to the right
MEAN = tl.constexpr(4)  # the mean of both, not the sum
FLAT = tl.constexpr(8)  # rows follow each other without a gap
WIDE = tl.constexpr(16)  # offsets within a map take 64 bits
QUICK = tl.constexpr(32)  # width > 1 and height * width^2 < 2^32, as _row_of needs it


@triton.jit
def _row_of(cells, view, HOW: tl.constexpr):
    """cells // width; QUICK: as the upper half of a product with ceil(2^32 / width)."""
    if QUICK & HOW:
        return tl.umulhi(cells.to(tl.uint32), view[8]).to(tl.int32)
    return cells // view[7]


@triton.jit
def _load(view, x, y, cells, mask, other, HOW: tl.constexpr):
    """Merged values of the cells (x, y), float32; ``other`` where not ``mask``.

    ``cells`` are their numbers, asked for only if FLAT.
    """
    maps, flipped, row, column, flipped_row, flipped_column, _, width, _, own = view
    if WIDE & HOW:
        x = x.to(tl.int64)
        y = y.to(tl.int64)
        cells = cells.to(tl.int64)
    pointers = maps + (cells * column if FLAT & HOW else y * row + x * column)
    # To float32 at once: 16-bit types would round in between.
    values = tl.load(pointers, mask=mask & own, other=other).to(tl.float32)
    if FLIP & HOW:
        mirrored = tl.minimum(width - x, width - 1) if SHIFT & HOW else width - 1 - x
        pointers = flipped + (y * flipped_row + mirrored * flipped_column)
        values = values + tl.load(pointers, mask=mask & own, other=0.0).to(tl.float32)
        if MEAN & HOW:
            values = values * 0.5
    return values


@triton.jit
def _cells(view, cells, HOW: tl.constexpr):
    """Merged values of cells by number; -inf behind the last."""
    y = _row_of(cells, view, HOW)
    x = cells - y * view[7]
    mask = cells < view[6] * view[7]
    return _load(view, x, y, cells, mask, float("-inf"), HOW)


@triton.jit
def _value(view, x, y, mask, other, HOW: tl.constexpr):
    return _load(view, x, y, y * view[7] + x, mask, other, HOW)


@triton.jit
def _any(flags):
    """Whether there is one in each row, [JOINTS, 1]."""
    return tl.max(flags.to(tl.int32), 1, keep_dims=True) > 0


@triton.jit
def _anywhere(flags):
    """Whether there is one at all, as a number that all threads agree on."""
    return tl.max(tl.max(flags.to(tl.int32), 1), 0)


@triton.jit
def _first_of(best, cell):
    """The highest in each row and the least cell that has it; no NaN among them."""
    highest = tl.max(best, 1, keep_dims=True)
    return highest, tl.min(tl.where(best == highest, cell, 2147483647), 1, keep_dims=True)


@triton.jit
def _higher(best, cell, nan, values, cells):
    """The better of two in each lane; of equal ones the first, which is the one it had."""
    higher = values > best
    nan = nan | (values != values)
    return tl.where(higher, values, best), tl.where(higher, cells, cell), nan


@triton.jit
def _maximum(
    view, HOW: tl.constexpr, JOINTS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr
):
    """Each map's maximum, its cell, and whether there is a NaN; [JOINTS, 1].

    Without LOOP a map is a tile; else four tiles are under way at a time, of which no more is kept
    than one tile of maxima and their cells.
    """
    at = tl.arange(0, BLOCK)[None, :]
    if LOOP:
        best = tl.full([JOINTS, BLOCK], float("-inf"), tl.float32)
        cell = tl.zeros([JOINTS, BLOCK], tl.int32) + at
        nan = best != best
        for start in range(0, view[6] * view[7], 4 * BLOCK):
            one = start + at
            two, three, four = one + BLOCK, one + 2 * BLOCK, one + 3 * BLOCK
            first, second = _cells(view, one, HOW), _cells(view, two, HOW)
            third, fourth = _cells(view, three, HOW), _cells(view, four, HOW)
            best, cell, nan = _higher(best, cell, nan, first, one)
            best, cell, nan = _higher(best, cell, nan, second, two)
            best, cell, nan = _higher(best, cell, nan, third, three)
            best, cell, nan = _higher(best, cell, nan, fourth, four)
    else:
        values = _cells(view, at, HOW)
        nan = values != values
        best = tl.where(nan, float("-inf"), values)
        cell = at
    highest, first_cell = _first_of(best, cell)
    return highest, first_cell, _any(nan)


# ---- Blurring ------------------------------------------------------------------------------------


@triton.jit
def _row_sums(view, taps, reach, x, y, mask, HOW: tl.constexpr):
    """The blur along rows at cells (x, y)."""
    total = tl.load(taps) * _value(view, x, y, mask, 0.0, HOW)
    for step in range(1, reach + 1):
        before = _value(view, x - step, y, mask & (x >= step), 0.0, HOW)
        after = _value(view, x + step, y, mask & (x + step < view[7]), 0.0, HOW)
        total = total + tl.load(taps + step) * (before + after)
    return total


@triton.jit
def _column_sums(view, plane, taps, reach, x, y, mask, JOINTS: tl.constexpr):
    """The blur along columns of what stands in the plane: blurred values at cells (x, y)."""
    height, width = view[6], view[7]
    mask = mask & view[9]
    at = plane + (y * width + x) * JOINTS
    pitch = width * JOINTS
    total = tl.load(taps) * tl.load(at, mask=mask, other=0.0)
    for step in range(1, reach + 1):
        before = tl.load(at - step * pitch, mask=mask & (y >= step), other=0.0)
        after = tl.load(at + step * pitch, mask=mask & (y + step < height), other=0.0)
        total = total + tl.load(taps + step) * (before + after)
    return total


@triton.jit
def _fill_plane(
    view, plane, taps, reach,
    HOW: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Row sums of all cells."""
    height, width = view[6], view[7]
    for start in range(0, height * width, CHUNK):
        cells = start + tl.arange(0, CHUNK)[None, :]
        y = _row_of(cells, view, HOW)
        mask = (cells < height * width) & view[9]
        sums = _row_sums(view, taps, reach, cells - y * width, y, mask, HOW)
        tl.store(plane + cells * JOINTS, sums, mask=mask)
    tl.debug_barrier()


@triton.jit
def _blurred_chunk(
    view, plane, taps, reach, start,
    HOW: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """CHUNK cells' numbers, which of them there are, and their blurred values."""
    cells = start + tl.arange(0, CHUNK)[None, :]
    y = _row_of(cells, view, HOW)
    mask = cells < view[6] * view[7]
    return (
        cells,
        mask,
        _column_sums(view, plane, taps, reach, cells - y * view[7], y, mask, JOINTS),
    )


@triton.jit
def _blurred_maximum(
    view, plane, taps, reach,
    HOW: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The blurred maps' maxima, NaN where there is one; fills the plane."""
    _fill_plane(view, plane, taps, reach, HOW, JOINTS, CHUNK)
    best = tl.full([JOINTS, CHUNK], float("-inf"), tl.float32)
    nan = best != best
    for start in range(0, view[6] * view[7], CHUNK):
        _, mask, values = _blurred_chunk(view, plane, taps, reach, start, HOW, JOINTS, CHUNK)
        nan = nan | (mask & (values != values))
        best = tl.where(mask & (values > best), values, best)
    highest = tl.max(best, 1, keep_dims=True)
    return tl.where(_any(nan), float("nan"), highest)


# ---- The methods: from a cell to a place, float64 ------------------------------------------------


@triton.jit
def _sign(after, before):
    """Of the difference; compared, not subtracted: two infinities are a tie."""
    return (after > before).to(tl.float64) - (after < before).to(tl.float64)


@triton.jit
def _slope_place(view, x, y, METHOD: tl.constexpr, HOW: tl.constexpr):
    """quarter, newell, princeton and msra."""
    height, width = view[6], view[7]
    everywhere = x >= 0
    right = _value(view, tl.minimum(x + 1, width - 1), y, everywhere, 0.0, HOW)
    left = _value(view, tl.maximum(x - 1, 0), y, everywhere, 0.0, HOW)
    below = _value(view, x, tl.minimum(y + 1, height - 1), everywhere, 0.0, HOW)
    above = _value(view, x, tl.maximum(y - 1, 0), everywhere, 0.0, HOW)
    slope_x, slope_y = _sign(right, left), _sign(below, above)
    place_x, place_y = x.to(tl.float64), y.to(tl.float64)
    if METHOD == "princeton":
        place_x = place_x + 0.5 + tl.where(right > left, 0.25, -0.25)
        place_y = place_y + 0.5 + tl.where(below > above, 0.25, -0.25)
    else:
        if METHOD == "newell":
            moves_x = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
            moves_y = moves_x
            place_x, place_y = place_x + 0.5, place_y + 0.5
        elif METHOD == "msra":
            moves_x = (x > 1) & (x < width - 1) & (y > 0)
            moves_y = (y > 1) & (y < height - 1) & (x > 0)
        else:
            moves_x = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
            moves_y = moves_x
        place_x = place_x + 0.25 * slope_x * moves_x.to(tl.float64)
        place_y = place_y + 0.25 * slope_y * moves_y.to(tl.float64)
    return place_x, place_y


@triton.jit
def _pick(values, dx, dy, SPAN: tl.constexpr, POINTS: tl.constexpr):
    """The value of the neighbour (dx, dy), out of POINTS of them by rows of 8."""
    chosen = tl.arange(0, POINTS)[None, :] == (dy + SPAN) * 8 + dx + SPAN
    return tl.sum(tl.where(chosen, values, 0.0), 1, keep_dims=True)


@triton.jit
def _newton_place(
    view, plane, taps, reach, x, y, highest, wanted, top, known,
    LOW: tl.constexpr, HIGH: tl.constexpr, METHOD: tl.constexpr, HOW: tl.constexpr,
    JOINTS: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dark and udp: places, and the blurred maps' maxima ``top`` with whether they are ``known``.

    Those are computed at the first cell that is ``wanted`` and has clipped values around it.
    """
    height, width = view[6], view[7]
    if METHOD == "dark":
        SPAN: tl.constexpr = 2
        inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    else:
        SPAN: tl.constexpr = 1
        inside = x >= 0
    wanted = wanted & inside & view[9]

    # Row sums around the cell, in rows of 8, of which 2 SPAN + 1 count.
    rows = 2 * (SPAN + reach) + 1
    for start in range(0, rows * 8, WINDOW):
        n = start + tl.arange(0, WINDOW)[None, :]
        near_x, near_y = x + (n % 8) - SPAN, y + (n // 8) - (SPAN + reach)
        counts = (n % 8 <= 2 * SPAN) & (n // 8 < rows)
        counts = counts & (near_x >= 0) & (near_x < width) & (near_y >= 0) & (near_y < height)
        counts = counts & view[9]
        sums = _row_sums(view, taps, reach, near_x, near_y, counts, HOW)
        tl.store(plane + (near_y * width + near_x) * JOINTS, sums, mask=counts)
    tl.debug_barrier()

    POINTS: tl.constexpr = 64 if SPAN == 2 else 32
    p = tl.arange(0, POINTS)[None, :]
    dx, dy = p % 8 - SPAN, p // 8 - SPAN
    if METHOD == "dark":
        needed = tl.abs(dx) + tl.abs(dy) <= 2
    else:
        needed = (dx <= 1) & (dy <= 1) & (dx * dy >= 0)
    needed = needed & view[9]
    point_x = tl.minimum(tl.maximum(x + dx, 0), width - 1)
    point_y = tl.minimum(tl.maximum(y + dy, 0), height - 1)
    blurred = _column_sums(view, plane, taps, reach, point_x, point_y, needed, JOINTS)
    blurred = blurred.to(tl.float64)

    one = tl.full([JOINTS, 1], 1.0, tl.float64)
    low = one * LOW  # a number that is only compared with would be rounded to float32
    clipped = _any(needed & ((blurred >= low) == 0))  # the negation also holds for NaN
    if METHOD == "udp":
        clipped = clipped | (highest > HIGH)
    clipped = clipped & wanted
    if (known == 0) & (_anywhere(clipped) > 0):
        top = _blurred_maximum(view, plane, taps, reach, HOW, JOINTS, CHUNK)
        known = known + 1
    scale = tl.where(clipped, highest.to(tl.float64) / top.to(tl.float64), one)
    values = scale * blurred
    values = tl.where(values < low, low, values)  # NaN stays
    if METHOD == "udp":
        values = tl.where(values > HIGH, one * HIGH, values)
    log = tl.log(tl.where(needed, values, one))

    centre = _pick(log, 0, 0, SPAN, POINTS)
    right, left = _pick(log, 1, 0, SPAN, POINTS), _pick(log, -1, 0, SPAN, POINTS)
    below, above = _pick(log, 0, 1, SPAN, POINTS), _pick(log, 0, -1, SPAN, POINTS)
    falling, rising = _pick(log, 1, 1, SPAN, POINTS), _pick(log, -1, -1, SPAN, POINTS)
    gradient_x, gradient_y = 0.5 * (right - left), 0.5 * (below - above)
    if METHOD == "dark":
        farther = _pick(log, 2, 0, SPAN, POINTS), _pick(log, -2, 0, SPAN, POINTS)
        dxx = 0.25 * (farther[0] - 2 * centre + farther[1])
        farther = _pick(log, 0, 2, SPAN, POINTS), _pick(log, 0, -2, SPAN, POINTS)
        dyy = 0.25 * (farther[0] - 2 * centre + farther[1])
        corners = _pick(log, -1, 1, SPAN, POINTS), _pick(log, 1, -1, SPAN, POINTS)
        dxy = 0.25 * (falling - corners[0] - corners[1] + rising)
    else:
        dxx = right - 2 * centre + left + 1.1920928955078125e-07
        dyy = below - 2 * centre + above + 1.1920928955078125e-07
        dxy = 0.5 * (falling - right - below + 2 * centre - left - above + rising)
    determinant = dxx * dyy - dxy * dxy
    step_x = (dxy * gradient_y - dyy * gradient_x) / determinant
    step_y = (dxy * gradient_x - dxx * gradient_y) / determinant
    finite = (tl.abs(step_x) < float("inf")) & (tl.abs(step_y) < float("inf"))
    moves = inside & finite
    place_x = x.to(tl.float64) + tl.where(moves, step_x, 0.0)
    place_y = y.to(tl.float64) + tl.where(moves, step_y, 0.0)
    return place_x, place_y, top, known


@triton.jit
def _megvii_place(
    view, plane, taps, reach, highest,
    HOW: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Places, and scores in float64 of maps with a positive maximum."""
    height, width = view[6], view[7]
    _fill_plane(view, plane, taps, reach, HOW, JOINTS, CHUNK)
    best = tl.full([JOINTS, CHUNK], float("-inf"), tl.float32)
    least = -best
    best_cell = tl.zeros([JOINTS, CHUNK], tl.int32) + tl.arange(0, CHUNK)[None, :]
    least_cell = best_cell
    nan_cell = tl.full([JOINTS, CHUNK], 2147483647, tl.int32)
    for start in range(0, height * width, CHUNK):
        cells, mask, values = _blurred_chunk(view, plane, taps, reach, start, HOW, JOINTS, CHUNK)
        higher, lower = mask & (values > best), mask & (values < least)
        best, best_cell = tl.where(higher, values, best), tl.where(higher, cells, best_cell)
        least, least_cell = tl.where(lower, values, least), tl.where(lower, cells, least_cell)
        nan_cell = tl.where(mask & (values != values), tl.minimum(nan_cell, cells), nan_cell)
    top, cell = _first_of(best, best_cell)
    bottom, bottom_cell = _first_of(-least, least_cell)
    first_nan = tl.min(nan_cell, 1, keep_dims=True)
    nan = first_nan < height * width
    # Negative throughout, a blurred map is turned upside down. A NaN is its maximum.
    down = (top < 0) & (nan == 0)
    cell = tl.where(nan, first_nan, tl.where(down, bottom_cell, cell))

    y = cell // width
    x = cell - y * width
    everywhere = x >= 0
    right = _column_sums(
        view, plane, taps, reach, tl.minimum(x + 1, width - 1), y, everywhere, JOINTS
    )
    left = _column_sums(view, plane, taps, reach, tl.maximum(x - 1, 0), y, everywhere, JOINTS)
    below = _column_sums(
        view, plane, taps, reach, x, tl.minimum(y + 1, height - 1), everywhere, JOINTS
    )
    above = _column_sums(view, plane, taps, reach, x, tl.maximum(y - 1, 0), everywhere, JOINTS)
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    quarter = tl.where(down, -0.25, 0.25).to(tl.float64)
    moves = inside.to(tl.float64)
    place_x = x.to(tl.float64) + (quarter * _sign(right, left) + 0.5) * moves
    place_y = y.to(tl.float64) + (quarter * _sign(below, above) + 0.5) * moves
    high = highest.to(tl.float64)
    high = tl.where(down, high * (-bottom.to(tl.float64) / top.to(tl.float64)), high)
    return place_x, place_y, high / 255 + 0.5


@triton.jit
def _softargmax_place(
    view, highest, beta, HOW: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr
):
    """Places, and whether a map has more than one value.

    Weights are float32 (a part in some millions off, which moves a place by as much of the map's
    size), their sums float64.
    """
    width = view[7]
    total = tl.zeros([JOINTS, CHUNK], tl.float64)
    total_x = total
    total_y = total
    lower = total != total
    for start in range(0, view[6] * width, CHUNK):
        cells = start + tl.arange(0, CHUNK)[None, :]
        values = _cells(view, cells, HOW)
        there = cells < view[6] * width
        lower = lower | (there & (values < highest))
        weights = tl.exp((values - highest) * beta)
        weights = tl.where(values == highest, 1.0, weights)
        weights = tl.where(there, weights, 0.0).to(tl.float64)
        y = _row_of(cells, view, HOW)
        x = cells - y * width
        total += weights
        total_x += weights * x.to(tl.float64)
        total_y += weights * y.to(tl.float64)
    all_ = tl.sum(total, 1, keep_dims=True)
    place_x = tl.sum(total_x, 1, keep_dims=True) / all_
    place_y = tl.sum(total_y, 1, keep_dims=True) / all_
    return place_x, place_y, _any(lower)


# ---- Writing -------------------------------------------------------------------------------------


@triton.jit
def _truncated(values):
    return tl.where(values < 0, tl.ceil(values), tl.floor(values))


@triton.jit
def _write(
    coords, scores, at, own, x, y, score, visible, matrix, origin_x, origin_y,
    MARK: tl.constexpr, MATRIX: tl.constexpr, TRUNCATE: tl.constexpr,
):  # fmt: skip
    x, y = tl.where(visible, x, MARK), tl.where(visible, y, MARK)
    if MATRIX:
        u, v = x - origin_x, y - origin_y
        x = (tl.load(matrix) * u + tl.load(matrix + 1) * v) + tl.load(matrix + 2)
        y = (tl.load(matrix + 3) * u + tl.load(matrix + 4) * v) + tl.load(matrix + 5)
        if TRUNCATE:
            x, y = _truncated(x), _truncated(y)
    tl.store(coords + 2 * at, x.to(tl.float32), mask=own)
    tl.store(coords + 2 * at + 1, y.to(tl.float32), mask=own)
    tl.store(scores + at, score.to(tl.float32), mask=own)


# ---- The kernels ---------------------------------------------------------------------------------


@triton.jit
def _view_of(
    maps, flipped, permutation, count, height, width, image, joint, own,
    by_image, by_joint, by_row, by_column,
    flipped_by_image, flipped_by_joint, flipped_by_row, flipped_by_column,
    HOW: tl.constexpr,
):  # fmt: skip
    image, own = image.to(tl.int64), joint < count
    maps = maps + (image * by_image + joint.to(tl.int64) * by_joint)
    if FLIP & HOW:
        shown = tl.load(permutation + joint, mask=own, other=0).to(tl.int64)
        flipped = flipped + (image * flipped_by_image + shown * flipped_by_joint)
    magic = width
    if QUICK & HOW:
        magic = tl.full([], 0xFFFFFFFF, tl.uint32) // width.to(tl.uint32) + 1
    return (
        maps, flipped, by_row, by_column, flipped_by_row, flipped_by_column, height, width, magic,
        own,
    )  # fmt: skip


@triton.jit
def decode_kernel(
    maps, flipped, permutation, matrix, taps, scratch, coords, scores,
    count, height, width,
    by_image, by_joint, by_row, by_column,
    flipped_by_image, flipped_by_joint, flipped_by_row, flipped_by_column,
    origin_x: tl.float64, origin_y: tl.float64, beta: tl.float32, reach,
    METHOD: tl.constexpr, MARK: tl.constexpr, HOW: tl.constexpr, MATRIX: tl.constexpr,
    TRUNCATE: tl.constexpr, JOINTS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
    CHUNK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One joint per map. A program per JOINTS maps of an image, ``count`` maps an image."""
    program = tl.program_id(0)
    groups = tl.cdiv(count, JOINTS)
    image = program // groups
    joint = (program - image * groups) * JOINTS + tl.arange(0, JOINTS)[:, None]
    own = joint < count
    view = _view_of(
        maps, flipped, permutation, count, height, width, image, joint, own,
        by_image, by_joint, by_row, by_column,
        flipped_by_image, flipped_by_joint, flipped_by_row, flipped_by_column, HOW,
    )  # fmt: skip
    plane = scratch + program.to(tl.int64) * JOINTS * height * width + tl.arange(0, JOINTS)[:, None]

    highest, cell, lost = _maximum(view, HOW, JOINTS, BLOCK, LOOP)
    visible = (highest > 0) & (lost == 0)
    score = highest.to(tl.float64)
    none = tl.full([], 0, tl.int32)
    if METHOD == "softargmax":
        x, y, several = _softargmax_place(view, highest, beta, HOW, JOINTS, CHUNK)
        visible = several & (lost == 0)
    elif METHOD == "megvii":
        x, y, megvii_score = _megvii_place(view, plane, taps, reach, highest, HOW, JOINTS, CHUNK)
        score = tl.where(visible, megvii_score, score)
    else:
        row = cell // width
        column = cell - row * width
        if METHOD == "argmax":
            x, y = column.to(tl.float64), row.to(tl.float64)
        elif METHOD == "dark":
            x, y, _, _ = _newton_place(
                view, plane, taps, reach, column, row, highest, visible, highest, none,
                1e-10, 0.0, METHOD, HOW, JOINTS, CHUNK, WINDOW,
            )  # fmt: skip
        elif METHOD == "udp":
            x, y, _, _ = _newton_place(
                view, plane, taps, reach, column, row, highest, visible, highest, none,
                1e-3, 50.0, METHOD, HOW, JOINTS, CHUNK, WINDOW,
            )  # fmt: skip
        else:
            x, y = _slope_place(view, column, row, METHOD, HOW)
    score = tl.where(lost, float("nan"), score)
    at = image.to(tl.int64) * count + joint
    _write(
        coords, scores, at, own, x, y, score, visible, matrix + image.to(tl.int64) * 6,
        origin_x, origin_y, MARK, MATRIX, TRUNCATE,
    )  # fmt: skip


@triton.jit
def _suppress(view, peaks, HOW: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr,
              RADIUS: tl.constexpr):  # fmt: skip
    """Write the cells' values to ``peaks``, -inf where no peak is; maxima, and where a NaN is."""
    height, width = view[6], view[7]
    best = tl.full([JOINTS, CHUNK], float("-inf"), tl.float32)
    nan = best != best
    for start in range(0, height * width, CHUNK):
        cells = start + tl.arange(0, CHUNK)[None, :]
        values = _cells(view, cells, HOW)
        y = _row_of(cells, view, HOW)
        x = cells - y * width
        nan = nan | (values != values)
        best = tl.where(values > best, values, best)
        peak = (values > 0) & view[9]
        # Only cells that may still be one ask for their next neighbour.
        for row in range(2 * RADIUS + 1):
            for column in range(2 * RADIUS + 1):
                at_x, at_y = x + (column - RADIUS), y + (row - RADIUS)
                there = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
                other = _value(view, at_x, at_y, peak & there, float("-inf"), HOW)
                peak = peak & ((other > values) == 0)
        kept = tl.where(peak, values, float("-inf"))
        tl.store(peaks + cells * JOINTS, kept, mask=(cells < height * width) & view[9])
    tl.debug_barrier()
    return tl.max(best, 1, keep_dims=True), _any(nan)


@triton.jit
def _next_peak(view, peaks, previous, cell, JOINTS: tl.constexpr, CHUNK: tl.constexpr):
    """The first peak behind one of value ``previous`` at ``cell``, by value and then by cell."""
    size = view[6] * view[7]
    best = tl.full([JOINTS, CHUNK], float("-inf"), tl.float32)
    best_cell = tl.zeros([JOINTS, CHUNK], tl.int32)
    for start in range(0, size, CHUNK):
        cells = start + tl.arange(0, CHUNK)[None, :]
        there = (cells < size) & view[9]
        values = tl.load(peaks + cells * JOINTS, mask=there, other=float("-inf"))
        behind = (values < previous) | ((values == previous) & (cells > cell))
        higher = behind & (values > best)
        best = tl.where(higher, values, best)
        best_cell = tl.where(higher, cells, best_cell)
    return _first_of(best, best_cell)


@triton.jit
def topk_kernel(
    maps, flipped, permutation, matrix, taps, scratch, coords, scores,
    count, height, width,
    by_image, by_joint, by_row, by_column,
    flipped_by_image, flipped_by_joint, flipped_by_row, flipped_by_column,
    origin_x: tl.float64, origin_y: tl.float64, k, reach,
    METHOD: tl.constexpr, MARK: tl.constexpr, HOW: tl.constexpr, MATRIX: tl.constexpr,
    TRUNCATE: tl.constexpr, JOINTS: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
    RADIUS: tl.constexpr,
):  # fmt: skip
    """The k highest peaks of each map, in k rounds that remember nothing but the peak before.

    ``scratch`` has a plane of peaks per program, for dark and udp another of row sums.
    """
    program = tl.program_id(0)
    groups = tl.cdiv(count, JOINTS)
    image = program // groups
    joint = (program - image * groups) * JOINTS + tl.arange(0, JOINTS)[:, None]
    own = joint < count
    view = _view_of(
        maps, flipped, permutation, count, height, width, image, joint, own,
        by_image, by_joint, by_row, by_column,
        flipped_by_image, flipped_by_joint, flipped_by_row, flipped_by_column, HOW,
    )  # fmt: skip
    size = JOINTS * height * width
    planes = 2 if METHOD == "dark" or METHOD == "udp" else 1
    peaks = scratch + program.to(tl.int64) * planes * size + tl.arange(0, JOINTS)[:, None]
    plane = peaks + size
    highest, lost = _suppress(view, peaks, HOW, JOINTS, CHUNK, RADIUS)
    previous = tl.full([JOINTS, 1], float("inf"), tl.float32)
    cell = tl.full([JOINTS, 1], -1, tl.int32)
    top = highest
    known = tl.full([], 0, tl.int32)
    left = known + 1
    for n in range(k):
        found = (lost != 0) & (lost == 0)
        x = tl.zeros([JOINTS, 1], tl.float64)
        y = x
        if left > 0:
            previous, cell = _next_peak(view, peaks, previous, cell, JOINTS, CHUNK)
            found = (previous > 0) & (lost == 0)
            left = _anywhere(found & own)
            row = cell // width
            column = cell - row * width
            if METHOD == "argmax":
                x, y = column.to(tl.float64), row.to(tl.float64)
            elif METHOD == "dark":
                x, y, top, known = _newton_place(
                    view, plane, taps, reach, column, row, highest, found, top, known,
                    1e-10, 0.0, METHOD, HOW, JOINTS, CHUNK, WINDOW,
                )  # fmt: skip
            elif METHOD == "udp":
                x, y, top, known = _newton_place(
                    view, plane, taps, reach, column, row, highest, found, top, known,
                    1e-3, 50.0, METHOD, HOW, JOINTS, CHUNK, WINDOW,
                )  # fmt: skip
            else:
                x, y = _slope_place(view, column, row, METHOD, HOW)
        score = tl.where(found, previous, 0.0)
        score = tl.where(lost, float("nan"), score)
        at = (image.to(tl.int64) * count + joint) * k + n
        _write(
            coords, scores, at, own, x, y, score, found, matrix + image.to(tl.int64) * 6,
            origin_x, origin_y, MARK, MATRIX, TRUNCATE,
        )  # fmt: skip
