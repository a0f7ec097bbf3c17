"""Bugs in the ring itself: the loop that moves shards, and the operator that computes with them."""

from __future__ import annotations

from .mutant import Mutant

LOOP, OPERATOR = "ringflash/circulate.py", "ringflash/operator.py"
LAWS = "tests/test_properties.py::"
ROUNDING = "tests/test_attention.py::test_half_precision_keeps_its_error_for_any_number_of_ranks[torch.bfloat16-aten]"
WIDE = "tests/test_attention.py::test_gradients_travel_in_float32_whichever_side_it_is"

RING = (
    Mutant(
        name="lost-hop-forward",
        file=LOOP,
        old="for meeting in step.visits:",
        new="for meeting in step.visits if totals or not number or number + 1 < len(plan.steps) else ():",
        breaks="The shard of the last hop is received and not computed with.",
        caught_by=(LAWS + "test_every_key_twice_adds_ln_2_to_lse_and_nothing_to_out",),
    ),
    Mutant(
        name="lost-hop-dk",
        file=OPERATOR,
        old="            return tuple(share)\n",
        new="            return (share[0] * float(shard != last), share[1])\n",
        breaks="dk lacks what the last visitor of each shard had to add; dv is right.",
        caught_by=(LAWS + "test_conservation_laws",),
    ),
    Mutant(
        name="lost-hop-dq",
        file=OPERATOR,
        old="self.scoring, dq, dtypes, self.deterministic",
        new="self.scoring, None, dtypes, self.deterministic",
        breaks="dq is that of the last hop alone.",
        caught_by=(LAWS + "test_conservation_laws",),
    ),
    Mutant(
        name="stale-buffer",
        file=LOOP,
        old="else self._parcels[shard].tensors\n",
        new="else [*self._parcels.values()][-1].tensors\n",
        breaks="A visit reads the buffer that the next hop is being written to.",
        caught_by=(LAWS + "test_a_full_mask_does_not_know_the_order_of_keys",),
        raises=("RuntimeError", "IndexError", "ValueError", "EinopsError"),
    ),
    Mutant(
        name="read-before-it-came",
        file=LOOP,
        old="        post.await_until(number)\n",
        new="",
        breaks="Nobody waits for a hop before its shard is used.",
        caught_by=(LAWS + "test_a_full_mask_does_not_know_the_order_of_keys",),
        raises=("RuntimeError", "DeadlockError"),
    ),
    Mutant(
        name="parcel-of-another-part",
        file=LOOP,
        old="if self._packed is None or self._packed[0] != part:",
        new="if self._packed is None:",
        breaks="What was packed for one rank is sent to the next one, which needs another part.",
        caught_by=("tests/test_attention.py::test_a_ring_of_any_size_equals_dense_attention",),
        raises=("WireError",),
    ),
    Mutant(
        name="share-of-a-visitor-lost",
        file=LOOP,
        old="            _add(same.tensors, part, share, held)\n            return same",
        new="            return same",
        breaks="A total passes a rank that does not add to it.",
        caught_by=(LAWS + "test_conservation_laws",),
    ),
    Mutant(
        name="totals-in-parts-lost",
        file=LOOP,
        old="        for came, parcel, _ in coming:\n            _add(total.tensors, part, parcel.tensors, came)\n",
        new="",
        breaks="Where a total has come in other parts than it leaves, what came is dropped.",
        caught_by=("tests/test_routes.py::test_every_topology_equals_dense_attention",),
    ),
    Mutant(
        name="own-share-overwritten",
        file=LOOP,
        old="                self._own = self._own or self._freight.zeros(self._whole.tokens).tensors\n                _add",
        new="                self._own = self._freight.zeros(self._whole.tokens).tensors\n                _add",
        breaks="The first total that comes home replaces what the owner has computed itself.",
        caught_by=(LAWS + "test_conservation_laws",),
    ),
    Mutant(
        name="carry-counted-twice",
        file="ringflash/reference.py",
        old="    found = owned(carry, q, v)\n",
        new="    found = owned(carry, q, v)\n    absorb(found, Partial(found.out.clone(), found.lse.clone()))\n",
        breaks="What earlier hops have found takes part in the softmax twice.",
        caught_by=("tests/test_backends.py::test_a_carry_is_added_to_and_dq_too",),
    ),
    Mutant(
        name="partials-rounded-in-every-hop",
        file=OPERATOR,
        old="kept = q.dtype if shard == last else dtype",
        new="kept = q.dtype",
        breaks="Out is rounded to bfloat16 after every hop, so the error grows with the number of ranks.",
        caught_by=(ROUNDING,),
    ),
    Mutant(
        name="gradients-travel-rounded",
        file=OPERATOR,
        old="Home(KEY_GRADIENTS, Freight.like((k, v), dtype))",
        new="Home(KEY_GRADIENTS, Freight.like((k, v)))",
        breaks="dk and dv are rounded to bfloat16 at every visitor.",
        caught_by=(WIDE,),
    ),
    Mutant(
        name="query-gradients-travel-rounded",
        file=OPERATOR,
        old="Home(QUERY_GRADIENTS, Freight.like((self.q,), dtype))",
        new="Home(QUERY_GRADIENTS, Freight.like((self.q,)))",
        breaks="The same of dq, where queries travel.",
        caught_by=(WIDE,),
    ),
    Mutant(
        name="shares-of-gradients-rounded",
        file=OPERATOR,
        old="handed_over = k.dtype if plan.ranks == 1 else lse.dtype",
        new="handed_over = k.dtype",
        breaks="Each rank rounds its share of dk and dv before they are summed.",
        caught_by=(WIDE,),
    ),
    Mutant(
        name="sink-in-every-hop",
        file=OPERATOR,
        old="        total = engine.attend(q, *tensors, table, scoring, total, kept)\n",
        new="        if sinks is not None and total is not None:\n"
        "            from ringflash.partial import merge\n\n"
        "            total = merge(total, _sink(sinks, q, v))\n"
        "        total = engine.attend(q, *tensors, table, scoring, total, kept)\n",
        breaks="A sink takes its part of the softmax once for every rank.",
        caught_by=("tests/test_attention.py::test_a_sink_counts_once_whatever_the_number_of_ranks",),
    ),
    Mutant(
        name="sink-learns-uphill",
        file=OPERATOR,
        old="return -(share * delta)",
        new="return (share * delta)",
        breaks="The gradient of sinks has the wrong sign.",
        caught_by=("tests/test_backends.py::test_the_gradient_of_sinks",),
    ),
    Mutant(
        name="sinks-of-the-first-heads",
        file=OPERATOR,
        old="None if sinks is None else sinks[mine]",
        new="None if sinks is None else sinks[: mine.stop - mine.start]",
        breaks="Where ranks share heads, all of them take the sinks of the first.",
        caught_by=("tests/test_routes.py::test_options_do_not_depend_on_the_topology",),
    ),
)
