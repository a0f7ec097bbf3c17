"""Bugs that people have really written into ring attention, planted one at a time: each must turn a test red.

A test that cannot fail proves nothing, and a suite that passes says nothing about what it would have missed. So every bug
that ever cost somebody a training run stands here as data: a place in the source, the wrong text for it, and the tests that
notice. A *mutant* is the library with one of them in it:

    ringflash/partial.py    lse = ..., weight_a / total, ...   ->   ..., weight_a, ...        one text, once in its file
                                     |
    a copy of the tree  --->  the tests that must notice  --->  a failed assertion: caught;  a green run: a survivor

    python -m tests.mutants                      all of them, as a table
    python -m tests.mutants lost-hop-forward     one
    python -m tests.mutants -n 2 --list          two at a time; or only what there is

A mutant that survives is either no bug (then it goes) or a test that is missing (then it is written).
"""

from __future__ import annotations
