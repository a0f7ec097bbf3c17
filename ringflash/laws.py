"""What gradients of attention obey whatever the mask, the layout and the number of ranks, in sums over all tokens.

A row of softmax sums to one, so a row of ds sums to dlse, which is 0 unless somebody differentiates lse; hence

    L1    sum dk  =  scale * sum dlse q            per key head         not with softcap, not with sinks
    L2    sum dv  =  sum dout                      over rows that see   not with dropout, not with sinks
    L3    <dq, q> =  <dk, k>
    L4    <dv, v> =  <dout, out>

A gradient that is lost, counted twice, sent to the wrong owner or computed with stale keys breaks one of them; what is wrong in
the same way for all keys of a row need not. They cost a few sums over what is here, and one small all-reduce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringflash.errors import IntegrityError
from ringflash.guard import Guard, unfit
from ringflash.reference import Scoring
from ringflash.wire import Collectives

_LAWS = (
    "L1: sum dkey = scale * sum dlse query",
    "L2: sum dvalue = sum dout",
    "L3: <dquery, query> = <dkey, key>",
    "L4: <dvalue, value> = <dout, out>",
)
ALLOWANCE = 4
"""How many roundings a law may be off. A correct backward is off by about one."""


def imbalances(
    everyone: Collectives,
    scoring: Scoring,
    sinks: bool,
    tensors: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
) -> dict[str, float]:
    """By law that holds for such a call, how far it is off, as a part of what is summed. Collective.

    ``tensors`` are this rank's q, k, v, ``gradients`` theirs, ``rows`` out, lse and the gradients of both.
    """
    dtype = tensors[0].dtype
    (q, k, v), (dq, dk, dv) = (tuple(x.double() for x in some) for some in (tensors, gradients))
    out, lse, dout, dlse = (x.double() for x in rows)
    lse, dlse = (x.transpose(1, 2)[..., None] for x in (lse, dlse))
    pull, level = (torch.where(lse == -torch.inf, 0.0, x) for x in (dlse, lse))
    dout = torch.where(lse == -torch.inf, 0.0, dout)

    def per_key_head(x: Tensor) -> Tensor:
        return x.sum((0, 1)).unflatten(0, (k.shape[2], -1)).sum(1)

    # a weight exp(s - lse) is as uncertain as s, which is rounded where it is large
    key, value = (
        float(x.square().mean().sqrt()) if x.numel() else 0.0 for x in (k, v)
    )  # of one number, as is usual here
    blur = 1 + _of_scores(tensors[0]) * (level.abs() + abs(scoring.scale) * _norm(q) * key)
    # what cancels in ds: where every row sees one key, dk is rounding and nothing else
    product, tiny = dout * out, torch.finfo(dtype).tiny  # what is smaller is rounded as it is
    cancels = _norm(product) + _sum(product) + (_norm(dout) + _sum(dout)) * value + pull.abs()
    cancels = scoring.scale * blur * cancels * q
    offs = [
        dk.sum((0, 1)) - scoring.scale * per_key_head(pull * q),
        dv.sum((0, 1)) - per_key_head(dout),
        (dq * q).sum() - (dk * k).sum(),
        (dv * v).sum() - product.sum(),
    ]
    summed = [
        *([dk, cancels], [dv, dout * blur], [dq * q, dk * k], [dv * v, product * blur, dout * blur * value]),
        [cancels],
    ]
    least = [[torch.ones_like(dk)], [torch.ones_like(dv)], [q, k], [v, dout], []]
    parts = [*offs, *(x.sum((0, 1)) for some in summed for x in some)]
    for some, small in zip(summed, least, strict=True):
        parts.append(sum((x.square().sum() for x in (*some, *(tiny * x for x in small))), torch.zeros_like(k.sum())))
    parts += [k.square().sum(), torch.tensor(float(k.numel()), device=k.device, dtype=k.dtype)]
    flat = torch.cat([x.flatten() for x in parts])
    everyone.all_reduce(flat)
    whole = iter(flat.split([x.numel() for x in parts]))
    found = [float(next(whole).norm()) for _ in offs]
    # errors of equal numbers are equal and add up, those of different ones do so as in a random walk
    alike = [sum(float(x.square().sum() + x.sum().square()) for _ in some for x in [next(whole)]) for some in summed]
    *sizes, lost = (a + float(next(whole)) for a in alike)
    keys, count = (float(x) for x in whole)
    sizes[2] += lost * keys / max(count, 1.0)
    holds = scoring.softcap == 0 and not sinks, scoring.dropout_p == 0 and not sinks, True, True
    return {
        law: off / max(size**0.5, 1e-300)
        for law, off, size, held in zip(_LAWS, found, sizes, holds, strict=True)
        if held
    }


def obey(
    guard: Guard,
    everyone: Collectives,
    scoring: Scoring,
    sinks: bool,
    tensors: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    rows: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Raise :class:`IntegrityError` on every rank if gradients break a law. Collective."""
    allowed = ALLOWANCE * rounding(tensors[0])
    broken = [
        f"{law} is off by {off:.1e} of what is summed, where roundings explain {allowed:.1e}"
        for law, off in imbalances(everyone, scoring, sinks, tensors, gradients, rows).items()
        if not off <= allowed
    ]
    if broken:
        fault = unfit(dict(zip(("dquery", "dkey", "dvalue"), gradients, strict=True)))
        raise IntegrityError(
            f"{guard.me}: gradients break a law: {'; '.join(broken)}. A contribution was lost, counted twice or computed "
            f"from stale numbers: take no step with them{f'; of this rank, {fault}' if fault else ''}"
        )


def rounding(x: Tensor) -> float:
    """The relative error of one operation on numbers such as ``x``, as backends compute."""
    rounded = x.is_cuda and x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return 2.0**-10 if rounded else float(torch.finfo(x.dtype).eps)


def _of_scores(x: Tensor) -> float:
    """The rounding of a score relative to that of results: scores of half precision are float32."""
    return 1.0 if x.dtype in (torch.float32, torch.float64) else torch.finfo(torch.float32).eps / rounding(x)


def _norm(x: Tensor) -> Tensor:
    return x.norm(dim=3, keepdim=True)


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=3, keepdim=True).abs()
