"""Bugs in the Triton kernels, run by Triton's interpreter."""

from __future__ import annotations

from .mutant import Mutant

FORWARD, DECODE, KEYS, QUERIES, TILES, MERGE, DELTA = (
    f"kernels/ringflash_kernels/{name}.py"
    for name in ("forward", "decode", "key_gradients", "query_gradients", "tiles", "merge", "delta")
)
ALL, LAWS = "tests/kernels/test_interpreted.py::", "tests/kernels/test_interpreted_laws.py::"

KERNELS = (
    Mutant(
        name="kernel-last-rescale-missing",
        file=FORWARD,
        old="\n    weights = p.to(DTYPE)\n    acc0 = acc0 * alpha[:, None]\n",
        new="\n    weights = p.to(DTYPE)\n",
        breaks="The sum keeps the weight that it had before the last tile.",
        caught_by=(LAWS + "test_tiles_of_any_shape_give_the_same[(16, 32)-several-False]",),
    ),
    Mutant(
        name="kernel-lse-base-2",
        file=FORWARD,
        old="(top + tl.math.log2(tl.where(unseen, 1.0, total))) * LN2)",
        new="(top + tl.math.log2(tl.where(unseen, 1.0, total))))",
        breaks="lse leaves the kernel as the logarithm to the base 2.",
        caught_by=(LAWS + "test_tiles_of_any_shape_give_the_same[(16, 32)-several-False]",),
    ),
    Mutant(
        name="kernel-heads-interleaved",
        file=FORWARD,
        old="hk = h // group",
        new="hk = h % (heads // group)",
        breaks="Query heads meet the key heads of other groups.",
        caught_by=(ALL + "test_whatever_is_combined[fp16-d64-h4,2-chunks-no_scale-100x33-40-misaligned]",),
    ),
    Mutant(
        name="kernel-carry-counted-twice",
        file=FORWARD,
        old="total = total * weight + old_weight",
        new="total = total * weight + 2.0 * old_weight",
        breaks="What earlier keys left behind takes twice its part of the softmax.",
        caught_by=(ALL + "test_a_ring_is_one_device[fp32-d16-h2,2-sliding-plain-100x100-contiguous-2-contiguous]",),
    ),
    Mutant(
        name="kernel-decode-heads-misnumbered",
        file=DECODE,
        old="h = hk * group + packed % group",
        new="h = hk * group + packed // queries",
        breaks="Where several queries are decoded at once, rows and heads change places.",
        caught_by=(ALL + "test_few_queries_and_many_keys[fp16-d16-h8,2-full-softcap-2x301+299-heads_first]",),
        raises=("InterpreterError",),  # of numbers that nobody wrote
    ),
    Mutant(
        name="kernel-split-lost",
        file=DECODE,
        old="tl.minimum(start + (split + 1) * share, stop)",
        new="tl.minimum(start + (split + 1) * share, stop - 1)",
        breaks="The last keys are attended to by nobody.",
        caught_by=(LAWS + "test_decoding_with_tiles_of_any_shape[16]",),
    ),
    Mutant(
        name="kernel-mask-off-by-one",
        file=KEYS,
        old="(key[:, None] < end[None, :])",
        new="(key[:, None] <= end[None, :])",
        breaks="Backward gives a gradient to a key that the query does not see.",
        caught_by=(LAWS + "test_tiles_of_any_shape_give_the_same[(16, 32)-several-False]",),
    ),
    Mutant(
        name="kernel-dropout-not-in-dp",
        file=KEYS,
        old="dp = tl.where(keep, dp * keep_scale, 0.0)",
        new="dp = dp * keep_scale",
        breaks="dk counts weights that were dropped.",
        caught_by=(LAWS + "test_tiles_of_any_shape_give_the_same[(16, 32)-several-False]",),
    ),
    Mutant(
        name="kernel-softcap-without-its-slope",
        file=QUERIES,
        old="        ds = ds * (1.0 - bent * bent)\n",
        new="        ds = ds\n",
        breaks="dq passes through the cap as if it were not there, where it has a pass of its own.",
        caught_by=(LAWS + "test_tiles_of_any_shape_give_the_same[(32, 16)-blind-True]",),
    ),
    Mutant(
        name="kernel-carried-dq-lost",
        file=QUERIES,
        old="        dq0 += tile(OLD",
        new="        tile(OLD",
        breaks="dq is that of the last hop alone.",
        caught_by=(
            ALL
            + "test_a_ring_is_one_device[fp32-d16,32-h3,1-several-sinks-30x50+20-contiguous-deterministic-2-zigzag]",
        ),
    ),
    Mutant(
        name="kernel-alibi-signed",
        file=TILES,
        old="tl.abs(query_position - key_position).to(tl.float32)",
        new="(query_position - key_position).to(tl.float32)",
        breaks="Keys ahead of the query get a bonus.",
        caught_by=(
            ALL
            + "test_whatever_is_combined[bf16-d17,33-h2,2-prefix-alibi_per_row-100x33-40-heads_first-deterministic]",
        ),
    ),
    Mutant(
        name="kernel-dropout-of-local-heads",
        file=TILES,
        old="head = head.to(tl.uint32) + (threshold >> 32).to(tl.uint32) - 1",
        new="head = head.to(tl.uint32)",
        breaks="Where ranks share heads, all of them drop what the first one drops.",
        caught_by=(LAWS + "test_dropout_counts_all_heads_where_ranks_share_them",),
    ),
    Mutant(
        name="kernel-empty-row-with-a-gradient",
        file=TILES,
        old="tl.where(unseen, 0.0, delta * ds_scale)",
        new="delta * ds_scale",
        breaks="NaN that comes as the gradient of a row that sees nothing spoils the keys.",
        caught_by=(LAWS + "test_a_gradient_that_is_no_number_stays_with_the_row_that_sees_nothing",),
    ),
    Mutant(
        name="kernel-32-bit-offsets",
        file=TILES,
        old="return tl.load(base + row.to(tl.int64)[:, None] * stride",
        new="return tl.load(base + row[:, None] * stride",
        breaks="Rows that begin beyond 2**31 elements are read from elsewhere.",
        caught_by=(LAWS + "test_tensors_beyond_two_to_the_31",),
        raises=("CalledProcessError",),
    ),
    Mutant(
        name="kernel-merge-without-rescale",
        file=MERGE,
        old="return acc * old_weight[:, None] + out",
        new="return acc + out",
        breaks="Splits of the keys are added with the weights that they had alone.",
        caught_by=(LAWS + "test_decoding_with_tiles_of_any_shape[16]",),
    ),
    Mutant(
        name="kernel-gradient-of-lse-ignored",
        file=DELTA,
        old="tl.sum(dout * out, 1) - dlse",
        new="tl.sum(dout * out, 1)",
        breaks="Who merges partials afterwards trains with wrong gradients.",
        caught_by=(LAWS + "test_tiles_of_any_shape_give_the_same[(16, 32)-several-False]",),
    ),
)
