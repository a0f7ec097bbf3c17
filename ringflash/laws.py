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

_ALLOWANCE = 8
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
    (q, k, v), (dq, dk, dv) = (tuple(x.double() for x in some) for some in (tensors, gradients))
    out, lse, dout, dlse = (x.double() for x in rows)
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    seen = (lse != -torch.inf).transpose(1, 2)[..., None]
    pull = torch.where(seen[..., 0], dlse.transpose(1, 2), 0.0)[..., None]

    def per_key_head(x: Tensor) -> Tensor:
        return x.sum((0, 1)).unflatten(0, (kv_heads, group)).sum(1)

    # what cancels in ds: where every row sees one key, dk is rounding and nothing else
    cancels = scoring.scale * dout.norm(dim=3) * (out.norm(dim=3) + pull[..., 0].abs()) * q.norm(dim=3)
    vectors = dk.sum((0, 1)) - scoring.scale * per_key_head(pull * q), dv.sum((0, 1)) - per_key_head(dout * seen)
    numbers = [(dq * q).sum() - (dk * k).sum(), (dv * v).sum() - (dout * out).sum()]
    squares = [
        *(dk.square().sum() + cancels.square().sum(), dv.square().sum()),
        (dq * q).square().sum() + (dk * k).square().sum(),
        (dv * v).square().sum() + (dout * out).square().sum(),
        *(cancels.square().sum(), k.square().sum(), torch.tensor(float(k[..., 0].numel()), device=k.device)),
    ]
    flat = torch.cat([*(x.flatten() for x in vectors), torch.stack(numbers + squares)])
    everyone.all_reduce(flat)
    l1, l2, rest = flat.split([vectors[0].numel(), vectors[1].numel(), len(numbers) + len(squares)])
    off3, off4, size1, size2, size3, size4, lost, keys, count = rest.tolist()
    size3 += lost * keys / max(count, 1.0)
    laws = {
        "L1: sum dkey = scale * sum dlse query": (float(l1.norm()), size1, scoring.softcap == 0 and not sinks),
        "L2: sum dvalue = sum dout": (float(l2.norm()), size2, scoring.dropout_p == 0 and not sinks),
        "L3: <dquery, query> = <dkey, key>": (abs(off3), size3, True),
        "L4: <dvalue, value> = <dout, out>": (abs(off4), size4, True),
    }
    return {law: off / max(size**0.5, 1e-300) for law, (off, size, holds) in laws.items() if holds}


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
    allowed = _ALLOWANCE * rounding(tensors[0])
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
