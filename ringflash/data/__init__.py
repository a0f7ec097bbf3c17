"""Packed documents: many texts in one long row, and each rank reads only its part of it.

    documents      ----- -- ------------- ---- ---------
    rows of 16     [-----=============----]  [--=========.....]     planned from the lengths alone
    ranks of a row  0 0 0 1 1 1 1 1 1 0 0 0   ...                   a layout says who reads which tokens

:class:`PackedLoader` yields what ``rf.SequenceParallel`` takes as ``model(**batch)``, this rank's part already;
:class:`PackingCollator` packs a list of examples into one whole row, for a DataLoader or Transformers' Trainer.
"""

from ringflash.data.collator import PackingCollator
from ringflash.data.documents import Documents, Tokens
from ringflash.data.loader import PackedLoader
from ringflash.data.packing import Piece, pack

__all__ = ["Documents", "PackedLoader", "PackingCollator", "Piece", "Tokens", "pack"]
