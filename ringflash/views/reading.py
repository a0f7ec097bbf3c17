"""Masks, documents and paths in words that fit on a command line, and in files.

    "causal & window(4095, 0)"        a mask: the names and calls of the mask algebra, joined by &
    lengths.txt                       packed documents: one length each, separated by white space or commas

Nothing of it is executed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from itertools import accumulate
from os import PathLike, fspath
from pathlib import Path

from ringflash.mask import Mask, causal, chunks, documents, full, prefix, window
from ringflash.units import read_tokens, spell_tokens

_NAMES: dict[str, Mask] = {"full": full, "causal": causal}
_CALLS: dict[str, Callable[..., Mask]] = {"window": window, "prefix": prefix, "chunks": chunks, "documents": documents}
_GRAMMAR = "full, causal, window(left, right), prefix(n), chunks(n), documents(offsets), joined by &"


def read_mask(text: str) -> Mask:
    """The mask that ``text`` spells, read without executing anything. Raises ``ValueError`` with the accepted words.

    >>> read_mask("causal & window(4095, None) & documents([0, 5, 8])")
    causal & documents((0, 5, 8))
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(f"mask is {_brief(text)}, which cannot be read; a mask is {_GRAMMAR}") from None
    mask = full
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitAnd):
        mask, tree = _read_term(tree.right, text) & mask, tree.left
    return _read_term(tree, text) & mask


def _read_term(node: ast.expr, text: str) -> Mask:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):  # in brackets
        return _read_term(node.left, text) & _read_term(node.right, text)
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        name = node.func.id
        try:
            values = [ast.literal_eval(value) for value in node.args]
            named = {str(pair.arg): ast.literal_eval(pair.value) for pair in node.keywords}
        except (ValueError, TypeError, SyntaxError):
            raise ValueError(f"mask is {_brief(text)}; {name} takes numbers or None, and nothing to compute") from None
        try:
            return _CALLS[name](*values, **named)
        except TypeError as error:
            raise ValueError(f"mask is {_brief(text)}; {error}") from None
    raise ValueError(f"mask is {_brief(text)}; {_brief(ast.unparse(node))} is no mask; a mask is {_GRAMMAR}")


def spell_mask(text: str) -> str:
    """The mask that ``text`` spells, which ``read_mask`` has accepted, as Python that makes it.

    >>> spell_mask("causal&window(4095,None)")
    'rf.causal & rf.window(4095, None)'
    """
    words = "|".join([*_NAMES, *_CALLS])
    return re.sub(rf"\b({words})\b", r"rf.\1", ast.unparse(ast.parse(text.strip(), mode="eval")))


def read_path(path: str | PathLike[str], suffixes: Sequence[str], where: str = "path") -> Path:
    """A file that can be written, by its suffix; raises ``TypeError`` or ``ValueError`` with the ``suffixes`` accepted."""
    accepted = f"a file name that ends in {' or '.join(suffixes)} is needed"
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{where} is {path!r}; {accepted}")
    file = Path(path)
    if file.suffix.lower() not in suffixes:
        raise ValueError(f"{where} is {_brief(fspath(path))}; {accepted}")
    if file.is_dir():
        raise ValueError(f"{where} is {_brief(fspath(path))}, a folder; {accepted}")
    return file


def read_documents(path: str | PathLike[str], length: int | None = None) -> tuple[int, ...]:
    """The offsets of packed documents, from a file of their lengths (``2048``, ``2K``; ``#`` starts a comment).

    Raises ``ValueError`` if the file holds none, something else, or another sum than ``length``; ``OSError`` if it cannot
    be read.
    """
    name = fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"documents: {name} is no text; a file of document lengths is needed") from None
    lengths = []
    for number, line in enumerate(text.splitlines(), start=1):
        for word in re.split(r"[\s,]+", line.partition("#")[0].strip()):
            try:
                lengths += [read_tokens(word)] if word else []
            except ValueError as error:
                raise ValueError(f"documents: line {number} of {name}: {error}") from None
    if not lengths:
        raise ValueError(f"documents: {name} holds no lengths; write one for each document")
    if length is not None and sum(lengths) != length:
        raise ValueError(
            f"documents: the {len(lengths)} documents of {name} hold {sum(lengths):,} tokens together, and the length is "
            f"{spell_tokens(length)} ({length:,}); leave --length away, or make them agree"
        )
    return tuple(accumulate(lengths, initial=0))


def _brief(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
