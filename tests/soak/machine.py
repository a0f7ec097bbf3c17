"""Random programs over the public API: every call is right, or refused alike on all ranks.

A program is a sequence of calls on one in-process world: shardings of all sorts, alive together; forwards whose backwards
come later, after other forwards, or twice; options, strides, dtypes, gradients of some inputs only; and in between calls
that are wrong in one or two arguments. Every answer is compared with the dense float64 oracle. A program that fails is
shrunk by hypothesis to a few lines, each of which is a rule of this file with its arguments.
"""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, precondition, rule
from soak.doors import attempt, judge
from soak.models import Tiny, dense_loss
from soak.problems import Forward, Spread, close, some_mask, some_options
from soak.wild import CALLS, namespace
from soak.world import Outcome, World
from torch import Tensor

import ringflash as rf

PROBLEMS = st.integers(0, 10**9)
"""From such a number each rule makes its problem."""
DTYPES = (torch.float64, torch.float64, torch.float32, torch.bfloat16)
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "dims first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every other": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
WRONG_ON_A_RING = (
    "ring_attention",
    "Sharding",
    "with_mask",
    "shard",
    "unshard",
    "flash_attention",
    "merge",
    "merge out",
)


class Calls(RuleBasedStateMachine):
    """Programs on one world."""

    shardings = Bundle("shardings")
    forwards = Bundle("forwards")

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None
        self._count, self._trained = 0, False
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        warnings.simplefilter("error")

    def teardown(self) -> None:
        if self.world is not None:
            self.world.end()
        self._filters.__exit__(None, None, None)

    @initialize(target=shardings, ranks=st.integers(1, 4), number=PROBLEMS)
    def begin(self, ranks: int, number: int) -> Any:
        """A world, and something to attend with."""
        self.world = World(ranks)
        return self._build(number)

    # what is built

    @rule(target=shardings, number=PROBLEMS)
    def build(self, number: int) -> Any:
        """Any sharding: lengths down to nothing, every layout and route, cross-attention, heads over ranks."""
        return self._build(number)

    def _build(self, number: int) -> Spread:
        draw, ranks = random.Random(number), self._ranks
        keys = draw.randint(0, 17)
        queries = keys if (draw.random() < 0.5) else draw.randint(0, 17)
        q_offset = draw.choice([0, keys - queries, draw.randint(-5, 5)])
        batch = draw.randint(1, 2)
        masked = some_mask(draw, keys, batch)
        degrees = [n for n in range(1, ranks + 1) if ranks % n == 0]
        degree = draw.choice(degrees)
        layouts = ["contiguous", "zigzag", "striped", "auto"]
        layouts += ["balanced"] if len(masked.mask.documents) == 1 and queries == keys else []
        layout = draw.choice(layouts)
        doubles = [rf.double_ring(n, ranks // degree // n) for n in degrees if (ranks // degree) % n == 0]
        routes = ["ring", "ring_down", "needed_only", "gather", "auto", rf.direct(2), *doubles]
        route = draw.choice(routes)
        s = Spread(self._name("s"), masked, queries, keys, q_offset, batch, degree)

        def make(group: Any, memory: dict[str, Any]) -> tuple[int, ...]:
            given = (queries, group, masked.mask, layout, route)
            memory[s.name] = rf.Sharding(*given, keys=keys, q_offset=q_offset, heads_axis=degree)
            return tuple(memory[s.name].positions.tolist())

        held = self._all(make)
        assert sorted(p for positions in held for p in positions) == list(range(queries)), "positions are no partition"
        return s

    @rule(target=shardings, s=shardings, number=PROBLEMS)
    def mask_anew(self, s: Spread, number: int) -> Any:
        """``with_mask``, a copy, or both: another plan for the same layout."""
        draw = random.Random(number)
        masked = some_mask(draw, s.keys, s.batch)
        copied = draw.random() < 0.5
        other = replace(s, name=self._name("s"), masked=masked)

        def make(group: Any, memory: dict[str, Any]) -> bool:
            origin = copy.deepcopy(memory[s.name]) if copied else memory[s.name]
            memory[other.name] = origin.with_mask(masked.mask)
            return bool(memory[other.name].mask == masked.mask)

        assert all(self._all(make))
        return other

    @rule(s=shardings, number=PROBLEMS)
    def look(self, s: Spread, number: int) -> None:
        """What a sharding says of itself, and moves without attention."""
        draw = random.Random(number)
        name = draw.choice(["pickle_it", "look_at_plans", "look_at_the_mask", "there_and_back"])
        getattr(self, f"_{name}")(s, draw)

    def _pickle_it(self, s: Spread, draw: random.Random) -> None:
        """A sharding with a group cannot travel; one of a pair can, and is equal."""
        outcomes = self._ask(lambda group, memory: pickle.dumps(memory[s.name]))
        assert all(isinstance(o.error, TypeError) and "cannot be pickled" in str(o.error) for o in outcomes), outcomes

        def pair(group: Any, memory: dict[str, Any]) -> bool:
            held = memory[s.name]
            given = (s.queries, (group.rank, group.ranks), held.mask, held.layout, held.route)
            one = rf.Sharding(*given, keys=s.keys, q_offset=s.q_offset, heads_axis=s.degree)
            return pickle.loads(pickle.dumps(one)) == one

        assert all(self._all(pair))

    def _look_at_plans(self, s: Spread, draw: random.Random) -> None:
        """Plans obey their laws, count the cells of the mask, print, and can be estimated."""
        verdicts = self._all(lambda group, memory: rf.verify(rf.plans(memory[s.name])))
        cells = int(s.masked.table(s.queries, s.keys, s.q_offset)[: s.masked.mask.rows].sum())
        assert {v.cells for v in verdicts} == {cells}, (verdicts, cells)
        texts = self._all(lambda group, memory: str(rf.plan(memory[s.name])))
        assert all(text.startswith("rank") for text in texts)
        given = dict(heads=4, batch=s.masked.mask.rows)
        told = self._all(lambda group, memory: rf.estimate(rf.plans(memory[s.name]), "h100", **given).seconds)
        assert len(set(told)) == 1, told

    def _look_at_the_mask(self, s: Spread, draw: random.Random) -> None:
        """A mask draws what it means, and joins with itself to itself."""
        mask, row = s.masked.mask, draw.randint(0, s.masked.mask.rows - 1)
        drawn = mask.draw(s.queries, s.keys, q_offset=s.q_offset, row=row)
        table = s.masked.table(s.queries, s.keys, s.q_offset)[row]
        assert drawn == "\n".join(" ".join("█" if cell else "·" for cell in line) for line in table.tolist())
        assert mask & mask == mask and (mask & rf.full) == mask and hash(mask & mask) == hash(mask)

    def _there_and_back(self, s: Spread, draw: random.Random) -> None:
        """``unshard(shard(x))`` is x, in any dim and dtype; its gradient is that of the identity on every rank."""
        dtype = draw.choice([torch.float32, torch.int64, torch.bool])
        dim = draw.randint(-3, 2)
        shape = [2, 3, 3]
        shape[dim] = s.queries
        x = torch.arange(1.0, 1.0 + torch.Size(shape).numel()).reshape(shape).to(dtype)

        def travel(group: Any, memory: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
            leaf = x.clone().requires_grad_(dtype.is_floating_point)
            back = memory[s.name].unshard(memory[s.name].shard(leaf, dim), dim)
            return back.detach(), torch.autograd.grad(back.sum(), leaf)[0] if back.requires_grad else None

        total = torch.zeros(shape)
        for back, gradient in self._all(travel):
            assert torch.equal(back, x)
            total = total if gradient is None else total + gradient
        if dtype.is_floating_point:
            assert torch.equal(total, torch.full(shape, float(self._ranks)))

    # attention

    @rule(target=forwards, s=shardings, number=PROBLEMS)
    def attend(self, s: Spread, number: int) -> Any:
        """A forward, compared with the oracle. Its backward comes later, or never."""
        draw = random.Random(number)
        kv_heads = draw.choice([1, 2, 4])
        groups = [n for n in (1, 2, 3) if (n * kv_heads) % s.degree == 0]
        if not groups:
            return multiple()
        dim = draw.choice([1, 4, 8])
        masked = some_mask(draw, s.keys, s.batch) if draw.random() < 0.3 else None
        f = Forward(
            name=self._name("f"),
            spread=s,
            masked=s.masked if masked is None else masked,
            seed=draw.randint(0, 1000),
            heads=kv_heads * draw.choice(groups),
            kv_heads=kv_heads,
            dims=(dim, draw.choice([dim, 2])),
            dtype=draw.choice(DTYPES),
            wants=draw.choice([(True, True, True), tuple(draw.random() < 0.5 for _ in range(3))]),
            options=(),
        )
        f = replace(f, options=some_options(draw, f.heads))
        strides = [STRIDES[draw.choice([*STRIDES])] for _ in range(3)]
        quiet = draw.random() < 0.2
        mask = None if masked is None else masked.mask

        def one_rank(group: Any, memory: dict[str, Any]) -> tuple[Tensor, ...]:
            s = memory[f.spread.name]
            q, k, v, *_ = f.whole
            sides = (s, s.key_sharding, s.key_sharding)
            parts = [stride(side.shard(x, 1)) for stride, side, x in zip(strides, sides, (q, k, v), strict=True)]
            leaves = [x.detach().requires_grad_(want) for x, want in zip(parts, f.wants, strict=True)]
            with torch.set_grad_enabled(not quiet):
                out, lse = rf.ring_attention(*leaves, s, mask, return_lse=True, **dict(f.options))
            assert out.requires_grad == (any(f.wants) and not quiet)
            memory[f.name] = leaves, out, lse
            return s.positions, out.detach(), lse.detach()

        ranks = self._all(one_rank)
        out, lse = (torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (f.whole[3], f.whole[4]))
        for mine, *found in ranks:
            out[:, mine], lse[:, :, mine] = found
        close({"out": out, "lse": lse}, f)
        if quiet or not any(f.wants):
            return multiple()
        if draw.random() < 0.5:
            self._differentiate(f, twice=False, expanded=False)
            return multiple()
        return f

    @rule(f=consumes(forwards), twice=st.booleans(), expanded=st.booleans())
    def differentiate(self, f: Forward, twice: bool, expanded: bool) -> None:
        """The backward of a forward made some time ago, perhaps two of them; gradients of those who asked."""
        self._differentiate(f, twice, expanded)

    def _differentiate(self, f: Forward, twice: bool, expanded: bool) -> None:
        def one_rank(group: Any, memory: dict[str, Any]) -> tuple[Any, ...]:
            s = memory[f.spread.name]
            leaves, out, lse = memory.pop(f.name)
            *_, dout, dlse = f.whole
            dout, dlse = s.shard(dout, 1), s.shard(dlse, 2)
            if expanded:  # a gradient with strides of its own
                dout = torch.stack([dout, dout])[1]
            wanted = [x for x in leaves if x.requires_grad]
            outputs, seeds = (out, lse), (dout, torch.where(lse == -torch.inf, 0.0, dlse))
            first = torch.autograd.grad(outputs, wanted, seeds, retain_graph=twice)
            if twice:
                again = torch.autograd.grad(outputs, wanted, seeds)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "the second backward differs"
            grads = iter(first)
            return s.positions, s.key_sharding.positions, [next(grads) if want else None for want in f.wants]

        ranks = self._all(one_rank)
        whole = {}
        for i, name in enumerate("qkv"):
            if f.wants[i]:
                total = torch.full_like(f.whole[i], torch.nan)
                for mine, theirs, grads in ranks:
                    assert grads[i].dtype == f.dtype
                    total[:, mine if name == "q" else theirs] = grads[i]
                whole[f"d{name}"] = total
        close(whole, f)

    @rule(f=consumes(forwards))
    def differentiate_twice(self, f: Forward) -> None:
        """There is no second derivative, and that is said before anybody waits."""

        def one_rank(group: Any, memory: dict[str, Any]) -> None:
            leaves, out, _ = memory.pop(f.name)
            wanted = [x for x in leaves if x.requires_grad]
            first = torch.autograd.grad(out.pow(2).sum(), wanted, create_graph=True, allow_unused=True)
            sum(x.sum() for x in first if x is not None).backward()

        outcomes = self._ask(one_rank)
        for o in outcomes:
            assert isinstance(o.error, RuntimeError) and "differentiated once" in str(o.error), (o, outcomes)

    @rule(number=PROBLEMS, parts=st.integers(1, 4))
    def merge_parts(self, number: int, parts: int) -> None:
        """Attention over all keys is the merged attention over some of them, in any order."""
        draw = random.Random(number)
        keys = draw.randint(1, 9)
        numbers = torch.Generator().manual_seed(number)
        q, k, v = (torch.randn(1, n, 2, 4, generator=numbers, dtype=torch.float64) for n in (3, keys, keys))
        cuts = sorted(draw.randint(0, keys) for _ in range(parts - 1))
        edges = list(zip([0, *cuts], [*cuts, keys], strict=True))
        some = [rf.flash_attention(q, k[:, a:b], v[:, a:b], rf.full, return_lse=True) for a, b in edges]
        total = rf.Partial(*some[0])
        for part in some[1:]:
            total = rf.merge(rf.Partial(*part), total)
        out, lse = oracle.attention(q, k, v, oracle.table(oracle.full(), 3, keys))
        torch.testing.assert_close((total.out, total.lse), (out, lse), rtol=1e-10, atol=1e-10)

    @precondition(lambda self: not self._trained)  # it takes as long as all the rest
    @rule(number=PROBLEMS)
    def train_a_model(self, number: int) -> None:
        """One step of a wrapped model: the loss and every gradient of one process."""
        draw = random.Random(number)
        self._trained = True
        length, seed = draw.randint(2, 13), draw.randint(0, 99)
        offsets = draw.choice([None, [draw.randint(0, length) for _ in range(draw.randint(0, 3))]])
        mask = rf.causal if offsets is None else rf.causal & rf.documents([0, *sorted(offsets), length])
        layout = draw.choice(["auto", "contiguous", "zigzag", "striped"])
        tokens = torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(seed))

        def one_rank(group: Any, memory: dict[str, Any]) -> tuple[float, list[Tensor]]:
            model = rf.SequenceParallel(Tiny(seed), group, mask=mask, layout=layout)
            out = model(input_ids=tokens, labels=tokens)
            out.loss.backward()
            return out.loss.item(), [p.grad for p in model.parameters()]

        loss, gradients = dense_loss(Tiny(seed), tokens, mask.documents[0] if mask.documents else None)
        for mine, grads in self._all(one_rank):
            assert abs(mine - loss) < 1e-9, (mine, loss)
            torch.testing.assert_close(grads, gradients, rtol=1e-7, atol=1e-9)

    # what is wrong

    @rule(name=st.sampled_from(WRONG_ON_A_RING), number=PROBLEMS)
    def call_wrongly(self, name: str, number: int) -> None:
        """One or two arguments that nobody should pass: the same refusal everywhere, or the right answer."""
        draw = random.Random(number)
        call = CALLS[name]
        holes = draw.sample([*call.kinds], min(len(call.kinds), draw.choice([1, 2])))
        wild = {hole: draw.choice([*call.kinds[hole].table]) for hole in holes}
        self._wrong(call, wild)

    def _wrong(self, call: Any, wild: dict[str, str]) -> None:
        source = call.write(**wild)
        if len(wild) > 1 and not any(call.kinds[h].table[w] in ("wild", "dtype", "none") for h, w in wild.items()):
            return  # two values that are each fine need not fit together, and then the sentence is about both

        def one_rank(group: Any, memory: dict[str, Any]) -> tuple[str | None, str]:
            names = memory["names"] = memory.get("names") or namespace()
            outcome = attempt(source, names)
            said = "" if outcome.error is None else f"{type(outcome.error).__name__}: {outcome.error}"
            return judge(call, wild, outcome, names), said

        verdicts = self._all(one_rank)
        assert verdicts[0][0] is None, f"{source}\n    {verdicts[0][0]}"
        assert len({said for _, said in verdicts}) == 1, f"{source}\n    ranks say different things: {verdicts}"

    # ranks

    @property
    def _ranks(self) -> int:
        assert self.world is not None
        return self.world.ranks

    def _ask(self, command: Callable[[Any, dict[str, Any]], Any]) -> list[Outcome]:
        assert self.world is not None
        return self.world.ask(command)

    def _all(self, command: Callable[[Any, dict[str, Any]], Any]) -> list[Any]:
        """The values of all ranks; a rank that raised fails the program."""
        outcomes = self._ask(command)
        for rank, outcome in enumerate(outcomes):
            if outcome.error is not None:
                others = [type(o.error).__name__ for o in outcomes]
                raise AssertionError(f"rank {rank} raised (all ranks: {others})") from outcome.error
        return [outcome.value for outcome in outcomes]

    def _name(self, letter: str) -> str:
        self._count += 1
        return f"{letter}{self._count}"
