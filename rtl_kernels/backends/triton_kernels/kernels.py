"""The Triton kernels: masked products of grouped rows as implicit matrix products.

Tested on an H200 against float64; verified by compilation for every architecture of the table, and by the interpreter.

Rows stand sorted by mask; group g holds rows [offsets[g], offsets[g + 1]) and goes through mask g − 1 (g = 0: dense).
The weight is (conv groups · R, Q, kh, kw); a linear layer is the 1×1 case with its inner dimensions for pixels:

    correlate      y[n, r, p]    = Σ_{q,t} (m ⊙ w)[r, q, t] · x[n, q, p·stride − pad + t·dilation] + bias[r]
    adjoint        y[n, q, p]    = Σ_{r,t} (m ⊙ w)[r, q, t] · x[n, r, (p + pad − t·dilation) / stride] + bias[q]
    weight_grad    dw[r, q, t]   = Σ_g m_g ⊙ Σ_{n ∈ g, p} small[n, r, p] · large[n, q, p·stride − pad + t·dilation]

A convolution's forward, dX and dW are (correlate, adjoint, weight_grad), a transposed one's (adjoint, correlate,
weight_grad).

The left factor of `tl.dot` is always the weight: it passes through registers, where its mask is applied, and only a
left factor may come from registers on sm_90 (wgmma) and later. It also puts rows on the side of the tensor core's tile
that may be narrow, so that small groups waste little.

The bits: a tile of words is loaded beside its tile of weights and widened in registers; a pruned weight becomes +0.
Words past an edge and those of the dense group read as all ones. `live` lists for every mask and tile of outputs the
tiles of the reduction that hold a set bit (`live_columns`, `live_rows`): the others are never visited.

Where a tile of rows begins: group g's tiles take the slots from ⌊offsets[g]·pixels / BLOCK⌋ + g on. Since
⌈(b − a) / n⌉ <= ⌊b / n⌋ − ⌊a / n⌋ + 1, no two groups meet, and ⌊rows·pixels / BLOCK⌋ + groups slots hold every tile. So
the grid needs no length from the device, and a program finds its group by counting the slots up to its own.

Every sum runs in an order that the group's own rows, the shapes and the mask decide; there are no atomics. Indices and
offsets are 64 bits wide where WIDE says that a tensor or the pixels of all rows need it, else 32: half the registers,
and dividing 64 bits is slow.
"""

import triton
import triton.language as tl


@triton.jit
def _at(index, WIDE: tl.constexpr):
    """`index` as wide as addresses are counted."""
    return tl.cast(index, tl.int64 if WIDE else tl.int32)


@triton.jit
def _pixel_of(offsets, row, pixels, WIDE: tl.constexpr):
    """Where sorted row `row` of `offsets` begins, counted in pixels."""
    return _at(tl.load(offsets + row), WIDE) * pixels


@triton.jit
def _locate(offsets, groups, pixels, slot, BLOCK: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """(group, first, end) of the tile in `slot`, counted in pixels; first >= end where the slot holds none."""
    group = -1
    for base in range(0, groups, CHUNK):
        g = base + tl.arange(0, CHUNK)
        first = _at(tl.load(offsets + g, mask=g < groups, other=0), WIDE)
        before = (first * pixels // BLOCK + g <= slot) & (g < groups)
        group += tl.sum(before.to(tl.int32), 0)
    first = _pixel_of(offsets, group, pixels, WIDE)
    end = _pixel_of(offsets, group + 1, pixels, WIDE)
    return group, first + (slot - (first // BLOCK + group)) * BLOCK, end


@triton.jit
def _sample(order, row, inside, samples, REPEAT: tl.constexpr, WIDE: tl.constexpr):
    """The sample a row reads: order[row], the row modulo the batch, or the row itself."""
    if order is not None:
        sample = tl.load(order + row, mask=inside, other=0)
    elif REPEAT:
        sample = row % samples
    else:
        sample = row
    return _at(sample, WIDE)


@triton.jit
def _bits_along_columns(words, inside, first, row_words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bits, from bit `first` (a multiple of COLUMNS) on; `words` are the ROWS rows' beginnings."""
    WORDS: tl.constexpr = (COLUMNS + 31) // 32
    WIDTH: tl.constexpr = COLUMNS // WORDS
    word = first // 32 + tl.arange(0, WORDS)
    packed = tl.load(words[:, None] + word[None, :], mask=inside[:, None] & (word < row_words)[None, :], other=-1)
    shift = first % 32 + tl.arange(0, WIDTH)
    return tl.reshape((packed[:, :, None] >> shift[None, None, :]) & 1, [ROWS, COLUMNS])


@triton.jit
def _bits_along_rows(words, inside, first, row_words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The same transposed: COLUMNS are rows of the weight, ROWS their bits from `first` on."""
    WORDS: tl.constexpr = (ROWS + 31) // 32
    WIDTH: tl.constexpr = ROWS // WORDS
    word = first // 32 + tl.arange(0, WORDS)
    packed = tl.load(words[None, :] + word[:, None], mask=inside[None, :] & (word < row_words)[:, None], other=-1)
    shift = first % 32 + tl.arange(0, WIDTH)
    return tl.reshape((packed[:, None, :] >> shift[None, :, None]) & 1, [ROWS, COLUMNS])


# ---- y = op(x, m ⊙ w) + b


@triton.jit
def correlate(
    x,
    weight,
    words,
    live,
    bias,
    y,
    offsets,
    order,
    groups,  # K + 1
    samples,  # the batch B, which REPEAT and SUM count rows by
    conv_groups,
    conv_rows,  # R
    conv_columns,  # Q
    row_words,
    weight_mask,  # strides between masks, 0 for a shared weight
    bias_mask,
    pixels,  # of y's plane
    y_width,
    x_height,
    x_width,
    x_n,  # strides
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_p,
    stride_h,
    stride_w,
    top,
    left,
    dilation_h,
    dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POINTWISE: tl.constexpr,  # 1×1, stride 1, no padding, planes walked with the stride of their width
    UNTIED: tl.constexpr,
    REPEAT: tl.constexpr,  # row r reads sample r mod B
    SUM: tl.constexpr,  # y's sample b is the sum over masks k of what row k·B + b of x gives
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KH * KW
    STEPS: tl.constexpr = 32 // BLOCK_K if BLOCK_K < 32 else 1  # tiles that one entry of `live` stands for
    tiles = (conv_rows + BLOCK_O - 1) // BLOCK_O
    tile_o = tl.program_id(0) % tiles
    conv_group = tl.program_id(0) // tiles % conv_groups
    slot = tl.program_id(0) // (tiles * conv_groups)
    if SUM:
        group = 0
        masks = groups - 1
        first = _at(slot, WIDE) * BLOCK_R
        end = _at(samples, WIDE) * pixels
    else:
        group, first, end = _locate(offsets, groups, pixels, slot, BLOCK_R, CHUNK, WIDE)
        masks = 1
    if first >= end:
        return

    flat = first + tl.arange(0, BLOCK_R)
    inside = flat < end
    row = flat // pixels
    pixel = flat % pixels
    sample = _sample(order, row, inside, samples, REPEAT, WIDE)
    x_row = x + (sample * x_n + _at(conv_group * conv_columns, WIDE) * x_c)
    if POINTWISE:
        x_row += _at(pixel, WIDE) * x_w
    else:
        in_h = pixel // y_width * stride_h - top
        in_w = pixel % y_width * stride_w - left
        x_row += _at(in_h, WIDE) * x_h + _at(in_w, WIDE) * x_w

    reduction = conv_columns * TAPS
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_inside = o < conv_rows
    weight_row = _at(conv_group * conv_rows + o, WIDE)
    entries = (reduction + BLOCK_K * STEPS - 1) // (BLOCK_K * STEPS)

    acc = tl.full((BLOCK_O, BLOCK_R), 0.0, tl.float32)
    for step in range(masks):
        if SUM:
            group = step + 1
        mask = _at(tl.maximum(group - 1, 0), WIDE)
        weights = weight + mask * weight_mask + weight_row * reduction
        words_row = words + (mask * conv_groups * conv_rows + weight_row) * row_words
        masked = o_inside & (group > 0)
        lives = live + ((mask * conv_groups + conv_group) * tiles + tile_o) * (entries + 1)
        count = tl.where(group > 0, tl.load(lives), entries) * STEPS
        for i in range(count):
            tile = tl.where(group > 0, tl.load(lives + 1 + i // STEPS), i // STEPS) * STEPS + i % STEPS
            k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
            k_inside = k < reduction
            factor = tl.load(weights[:, None] + k[None, :], mask=o_inside[:, None] & k_inside[None, :], other=0.0)
            bits = _bits_along_columns(words_row, masked, tile * BLOCK_K, row_words, BLOCK_O, BLOCK_K)
            factor = tl.where(bits != 0, factor, 0.0)
            within = inside[None, :] & k_inside[:, None]
            if POINTWISE:
                k_offset = _at(k, WIDE) * x_c
            else:
                tap = k % TAPS
                off_h = tap // KW * dilation_h
                off_w = tap % KW * dilation_w
                at_h = in_h[None, :] + off_h[:, None]
                at_w = in_w[None, :] + off_w[:, None]
                within = within & (at_h >= 0) & (at_h < x_height) & (at_w >= 0) & (at_w < x_width)
                k_offset = _at(k // TAPS, WIDE) * x_c + _at(off_h, WIDE) * x_h + _at(off_w, WIDE) * x_w
            other = tl.load(x_row[None, :] + k_offset[:, None], mask=within, other=0.0)
            acc = tl.dot(factor, other, acc, input_precision=PRECISION)
        if SUM:
            x_row += _at(samples, WIDE) * x_n

    if bias is not None:
        mask = _at(tl.maximum(group - 1, 0), WIDE)
        acc += tl.load(bias + mask * bias_mask + weight_row, mask=o_inside, other=0.0).to(tl.float32)[:, None]
    if UNTIED and not SUM:  # where the dense group has no weight: loud, as it cannot be refused without synchronising
        acc = tl.where(group > 0, acc, float("nan"))
    target = _at(row, WIDE)
    if order is not None:
        target = sample
    y_row = y + target * y_n + _at(pixel, WIDE) * y_p
    inside_y = o_inside[:, None] & inside[None, :]
    tl.store(y_row[None, :] + weight_row[:, None] * y_c, acc.to(y.dtype.element_ty), mask=inside_y)


# ---- y = opᵀ(x, m ⊙ w) + b


@triton.jit
def _first_tap(at, dilation, stride, K: tl.constexpr, STEP: tl.constexpr):
    """(first, count) of the taps t, STEP apart, with at − t·dilation a multiple of stride."""
    first = K
    for t in tl.static_range(0, min(STEP, K)):  # unrolled: Triton 3.6 fails to compile it otherwise
        first = tl.where(((at - t * dilation) % stride == 0) & (t < first), t, first)
    return first, (K - first + STEP - 1) // STEP


@triton.jit(do_not_specialize=["row_words"])  # Triton 3.6 fails to compile it for TF32 where it is the constant 1
def adjoint(
    x,
    weight,
    words,
    live,
    bias,
    y,
    offsets,
    order,
    groups,
    samples,
    conv_groups,
    conv_rows,
    conv_columns,
    row_words,
    weight_mask,
    bias_mask,
    y_height,
    y_width,
    x_height,
    x_width,
    x_n,
    x_c,
    x_h,
    x_w,
    y_n,
    y_c,
    y_h,
    y_w,
    stride_h,
    stride_w,
    top,
    left,
    dilation_h,
    dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STEP_H: tl.constexpr,  # stride / gcd(stride, dilation): a phase's taps are that far apart
    STEP_W: tl.constexpr,
    POINTWISE: tl.constexpr,
    UNTIED: tl.constexpr,
    REPEAT: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KH * KW
    tiles = (conv_columns + BLOCK_O - 1) // BLOCK_O
    tile_o = tl.program_id(0) % tiles
    conv_group = tl.program_id(0) // tiles % conv_groups
    slot = tl.program_id(0) // (tiles * conv_groups)

    # y's pixels of one phase (their position modulo the stride) are reached by the same taps: no product is wasted.
    phase_h = tl.program_id(1) // stride_w
    phase_w = tl.program_id(1) % stride_w
    width = (y_width - phase_w + stride_w - 1) // stride_w
    pixels = (y_height - phase_h + stride_h - 1) // stride_h * width
    if pixels <= 0:
        return
    first_h, count_h = _first_tap(phase_h + top, dilation_h, stride_h, KH, STEP_H)
    first_w, count_w = _first_tap(phase_w + left, dilation_w, stride_w, KW, STEP_W)
    taps = count_h * count_w

    if SUM:
        group = 0
        masks = groups - 1
        first = _at(slot, WIDE) * BLOCK_R
        end = _at(samples, WIDE) * pixels
    else:
        group, first, end = _locate(offsets, groups, pixels, slot, BLOCK_R, CHUNK, WIDE)
        masks = 1
    if first >= end:
        return

    flat = first + tl.arange(0, BLOCK_R)
    inside = flat < end
    row = flat // pixels
    pixel = flat % pixels
    h = pixel // width
    w = pixel % width
    sample = _sample(order, row, inside, samples, REPEAT, WIDE)
    x_row = x + (sample * x_n + _at(conv_group * conv_rows, WIDE) * x_c)
    if POINTWISE:
        x_row += _at(pixel, WIDE) * x_w
    else:
        x_row += _at(h, WIDE) * x_h + _at(w, WIDE) * x_w

    row_bits = conv_columns * TAPS
    q = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    q_inside = q < conv_columns
    entries = (conv_rows + BLOCK_K - 1) // BLOCK_K

    acc = tl.full((BLOCK_O, BLOCK_R), 0.0, tl.float32)
    for step in range(masks):
        if SUM:
            group = step + 1
        mask = _at(tl.maximum(group - 1, 0), WIDE)
        weights = weight + mask * weight_mask
        words_mask = words + mask * conv_groups * conv_rows * row_words
        lives = live + ((mask * conv_groups + conv_group) * tiles + tile_o) * (entries + 1)
        count = tl.where(group > 0, tl.load(lives), entries) * taps
        for i in range(count):
            entry = i // taps if not POINTWISE else i
            k = tl.where(group > 0, tl.load(lives + 1 + entry), entry) * BLOCK_K + tl.arange(0, BLOCK_K)
            k_inside = k < conv_rows
            weight_row = _at(conv_group * conv_rows + k, WIDE)
            words_row = words_mask + weight_row * row_words
            masked = k_inside & (group > 0)
            within = inside
            x_tap = x_row
            if POINTWISE:
                bit = q
                bits = _bits_along_rows(words_row, masked, tile_o * BLOCK_O, row_words, BLOCK_O, BLOCK_K)
            else:
                tap = i % taps
                tap_h = first_h + tap // count_w * STEP_H
                tap_w = first_w + tap % count_w * STEP_W
                bit = q * TAPS + tap_h * KW + tap_w
                packed = tl.load(
                    words_row[None, :] + (bit // 32)[:, None], mask=masked[None, :] & q_inside[:, None], other=-1
                )
                bits = (packed >> (bit % 32)[:, None]) & 1
                off_h = (phase_h + top - tap_h * dilation_h) // stride_h  # exact
                off_w = (phase_w + left - tap_w * dilation_w) // stride_w
                within = within & (h + off_h >= 0) & (h + off_h < x_height) & (w + off_w >= 0) & (w + off_w < x_width)
                x_tap += _at(off_h, WIDE) * x_h + _at(off_w, WIDE) * x_w
            inside_w = q_inside[:, None] & k_inside[None, :]
            factor = tl.load(weights + bit[:, None] + (weight_row * row_bits)[None, :], mask=inside_w, other=0.0)
            factor = tl.where(bits != 0, factor, 0.0)
            other = tl.load(
                x_tap[None, :] + _at(k, WIDE)[:, None] * x_c, mask=within[None, :] & k_inside[:, None], other=0.0
            )
            acc = tl.dot(factor, other, acc, input_precision=PRECISION)
        if SUM:
            x_row += _at(samples, WIDE) * x_n

    channel = _at(conv_group * conv_columns + q, WIDE)
    if bias is not None:
        mask = _at(tl.maximum(group - 1, 0), WIDE)
        acc += tl.load(bias + mask * bias_mask + channel, mask=q_inside, other=0.0).to(tl.float32)[:, None]
    if UNTIED and not SUM:
        acc = tl.where(group > 0, acc, float("nan"))
    target = _at(row, WIDE)
    if order is not None:
        target = sample
    y_row = y + target * y_n
    if POINTWISE:
        y_row += _at(pixel, WIDE) * y_w
    else:
        y_row += _at(phase_h + h * stride_h, WIDE) * y_h + _at(phase_w + w * stride_w, WIDE) * y_w
    inside_y = q_inside[:, None] & inside[None, :]
    tl.store(y_row[None, :] + channel[:, None] * y_c, acc.to(y.dtype.element_ty), mask=inside_y)


# ---- dw = Σ_k m_k ⊙ (dy_kᵀ x_k), db = Σ dy


@triton.jit
def _share(offsets, first_row, end_row, pixels, split, splits, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """[low, high): which pixels of the rows from offsets[first_row] to offsets[end_row] a split takes."""
    low = _pixel_of(offsets, first_row, pixels, WIDE)
    end = _pixel_of(offsets, end_row, pixels, WIDE)
    share = ((end - low + splits - 1) // splits + BLOCK - 1) // BLOCK * BLOCK
    low += split * share
    return low, tl.minimum(low + share, end)


@triton.jit
def weight_grad(
    small,
    large,
    words,
    dw,  # (splits, the weight's shape)
    offsets,
    order,
    groups,
    small_samples,
    large_samples,
    conv_groups,
    conv_rows,
    conv_columns,
    row_words,
    pixels,  # of small's plane
    small_width,
    large_height,
    large_width,
    small_n,
    small_c,
    small_p,
    large_n,
    large_c,
    large_h,
    large_w,
    stride_h,
    stride_w,
    top,
    left,
    dilation_h,
    dilation_w,
    KH: tl.constexpr,
    KW: tl.constexpr,
    POINTWISE: tl.constexpr,
    UNTIED: tl.constexpr,
    REPEAT_SMALL: tl.constexpr,
    REPEAT_LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    TAPS: tl.constexpr = KH * KW
    reduction = conv_columns * TAPS
    tiles_o = (conv_rows + BLOCK_O - 1) // BLOCK_O
    tiles_k = (reduction + BLOCK_K - 1) // BLOCK_K
    tile_k = tl.program_id(0) % tiles_k
    tile_o = tl.program_id(0) // tiles_k % tiles_o
    conv_group = tl.program_id(0) // (tiles_k * tiles_o) % conv_groups
    split = tl.program_id(1)

    first_group = 0
    last_group = groups
    if UNTIED:  # a program of its own for every mask; its split counts its own rows only
        first_group = tl.program_id(0) // (tiles_k * tiles_o * conv_groups) + 1
        last_group = first_group + 1
    low, high = _share(offsets, first_group, last_group, pixels, split, tl.num_programs(1), BLOCK_R, WIDE)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_inside = o < conv_rows
    weight_row = _at(conv_group * conv_rows + o, WIDE)
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    k_inside = k < reduction
    tap = k % TAPS
    off_h = tap // KW * dilation_h - top
    off_w = tap % KW * dilation_w - left
    small_row = small + weight_row * small_c
    large_column = large + _at(conv_group * conv_columns + k // TAPS, WIDE) * large_c
    large_column += _at(off_h, WIDE) * large_h + _at(off_w, WIDE) * large_w

    total = tl.full((BLOCK_O, BLOCK_K), 0.0, tl.float32)
    for group in range(first_group, last_group):
        first = tl.maximum(_pixel_of(offsets, group, pixels, WIDE), low)
        end = tl.minimum(_pixel_of(offsets, group + 1, pixels, WIDE), high)
        if first < end:
            mask = _at(tl.maximum(group - 1, 0), WIDE)
            words_row = words + (mask * conv_groups * conv_rows + weight_row) * row_words
            masked = o_inside & (group > 0)
            bits = _bits_along_columns(words_row, masked, tile_k * BLOCK_K, row_words, BLOCK_O, BLOCK_K)
            bits = tl.where(o_inside[:, None] & k_inside[None, :], bits, 0)
            if tl.max(tl.max(bits, 1), 0) != 0:
                acc = tl.full((BLOCK_O, BLOCK_K), 0.0, tl.float32)
                for start in range(first, end, BLOCK_R):
                    flat = start + tl.arange(0, BLOCK_R)
                    inside = flat < end
                    row = flat // pixels
                    pixel = flat % pixels
                    n_small = _sample(order, row, inside, small_samples, REPEAT_SMALL, WIDE)
                    n_large = _sample(order, row, inside, large_samples, REPEAT_LARGE, WIDE)
                    at_small = n_small * small_n + _at(pixel, WIDE) * small_p
                    left_factor = tl.load(
                        small_row[:, None] + at_small[None, :], mask=o_inside[:, None] & inside[None, :], other=0.0
                    )
                    within = k_inside[:, None] & inside[None, :]
                    at_large = n_large * large_n
                    if POINTWISE:
                        at_large += _at(pixel, WIDE) * large_w
                    else:
                        h = pixel // small_width * stride_h
                        w = pixel % small_width * stride_w
                        at_large += _at(h, WIDE) * large_h + _at(w, WIDE) * large_w
                        at_h = h[None, :] + off_h[:, None]
                        at_w = w[None, :] + off_w[:, None]
                        within = within & (at_h >= 0) & (at_h < large_height) & (at_w >= 0) & (at_w < large_width)
                    right_factor = tl.load(large_column[:, None] + at_large[None, :], mask=within, other=0.0)
                    acc = tl.dot(left_factor, tl.trans(right_factor), acc, input_precision=PRECISION)
                total += tl.where(bits != 0, acc, 0.0)

    at = _at(split, WIDE) * conv_groups
    if UNTIED:
        at = at * (groups - 1) + _at(first_group - 1, WIDE) * conv_groups
    target = dw + (at * conv_rows + weight_row) * reduction
    inside_w = o_inside[:, None] & k_inside[None, :]
    tl.store(target[:, None] + k[None, :], total.to(dw.dtype.element_ty), mask=inside_w)


@triton.jit
def bias_grad(
    dy,
    db,  # (splits, [K,] channels)
    offsets,
    order,
    groups,
    channels,
    pixels,
    dy_n,
    dy_c,
    dy_p,
    UNTIED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles = (channels + BLOCK_O - 1) // BLOCK_O
    split = tl.program_id(1)
    first_group = 0
    last_group = groups
    if UNTIED:
        first_group = tl.program_id(0) // tiles + 1
        last_group = first_group + 1
    low, high = _share(offsets, first_group, last_group, pixels, split, tl.num_programs(1), BLOCK_R, WIDE)
    c = tl.program_id(0) % tiles * BLOCK_O + tl.arange(0, BLOCK_O)
    c_inside = c < channels
    acc = tl.full((BLOCK_O, BLOCK_R), 0.0, tl.float32)
    for start in range(low, high, BLOCK_R):
        flat = start + tl.arange(0, BLOCK_R)
        inside = flat < high
        n = _sample(order, flat // pixels, inside, 1, False, WIDE)
        at = n * dy_n + _at(flat % pixels, WIDE) * dy_p
        inside_dy = c_inside[:, None] & inside[None, :]
        acc += tl.load(dy + _at(c, WIDE)[:, None] * dy_c + at[None, :], mask=inside_dy, other=0.0).to(tl.float32)
    at = _at(split, WIDE)
    if UNTIED:
        at = at * (groups - 1) + first_group - 1
    tl.store(db + at * channels + c, tl.sum(acc, 1).to(db.dtype.element_ty), mask=c_inside)


@triton.jit
def sum_splits(parts, out, size, splits, BLOCK: tl.constexpr):
    """out[i] = Σ_s parts[s, i], in the order of s."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.full((BLOCK,), 0.0, tl.float32)
    for split in range(splits):
        acc += tl.load(parts + tl.cast(split, tl.int64) * size + i, mask=i < size, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


# ---- which tiles hold a bit


@triton.jit
def live_columns(words, live, rows, row_words, BLOCK_O: tl.constexpr, TILE_WORDS: tl.constexpr, CHUNK: tl.constexpr):
    """For `correlate`: which tiles of TILE_WORDS words hold a bit in any of a tile's BLOCK_O rows.

    One program a mask, conv group and tile of rows; its list is the count and then the tiles in ascending order.
    """
    tiles = (rows + BLOCK_O - 1) // BLOCK_O
    entries = (row_words + TILE_WORDS - 1) // TILE_WORDS
    block = (tl.program_id(0) // tiles).to(tl.int64)  # mask and conv group
    first = tl.program_id(0) % tiles * BLOCK_O
    lives = live + tl.program_id(0).to(tl.int64) * (entries + 1)
    count = 0
    for base in range(0, row_words, CHUNK):
        word = base + tl.arange(0, CHUNK)
        held = tl.full((CHUNK,), 0, tl.int32)
        for start in range(0, BLOCK_O, 8):
            row = first + start + tl.arange(0, 8)
            inside = (row < rows)[:, None] & (word < row_words)[None, :]
            packed = tl.load(words + ((block * rows + row) * row_words)[:, None] + word[None, :], mask=inside, other=0)
            held |= tl.max((packed != 0).to(tl.int32), 0)
        flag = tl.max(tl.reshape(held, [CHUNK // TILE_WORDS, TILE_WORDS]), 1)
        place = count + tl.cumsum(flag, 0) - flag
        tile = base // TILE_WORDS + tl.arange(0, CHUNK // TILE_WORDS)
        tl.store(lives + 1 + place, tile, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(lives, count)


@triton.jit
def live_rows(
    words,
    live,
    rows,
    columns,
    row_words,
    TAPS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For `adjoint`: which tiles of TILE rows hold a bit in any of a tile's BLOCK_O columns.

    A word is read whole, so that a neighbour's bit can keep a tile alive that holds none: slower, never wrong.
    """
    tiles = (columns + BLOCK_O - 1) // BLOCK_O
    entries = (rows + TILE - 1) // TILE
    block = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_O
    first_word = first * TAPS // 32
    last_word = tl.minimum(((first + BLOCK_O) * TAPS + 31) // 32, row_words)
    lives = live + tl.program_id(0).to(tl.int64) * (entries + 1)
    count = 0
    for base in range(0, rows, CHUNK):
        row = base + tl.arange(0, CHUNK)
        held = tl.full((CHUNK,), 0, tl.int32)
        for start in range(first_word, last_word, 4):
            word = start + tl.arange(0, 4)
            inside = (row < rows)[:, None] & (word < last_word)[None, :]
            packed = tl.load(words + ((block * rows + row) * row_words)[:, None] + word[None, :], mask=inside, other=0)
            held |= tl.max((packed != 0).to(tl.int32), 1)
        flag = tl.max(tl.reshape(held, [CHUNK // TILE, TILE]), 1)
        place = count + tl.cumsum(flag, 0) - flag
        tile = base // TILE + tl.arange(0, CHUNK // TILE)
        tl.store(lives + 1 + place, tile, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(lives, count)
