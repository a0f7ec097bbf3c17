"""What our sources may not do, read from their syntax trees: unpickle, run text as code, listen, fetch; and what they read.

A pickle is a program that runs when it is read: a checkpoint, a token file or a note in the store would be as powerful as
whoever can write it. Nothing here reads or writes one, also not through functions of torch, numpy and others that do so
inside. One line of a later change is enough to end that, and SECURITY.md promises it.
"""

from __future__ import annotations

import ast
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from processes import torchrun

from ringflash.board import LONGEST, StoreBoard
from ringflash.data import PackedLoader, PackingCollator, Tokens

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ringflash", "kernels", "launch", "benchmarks", "locked", "tests/programs")
WATCHER = ROOT / "tests" / "programs" / "watched.py"  # names what it looks out for
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if file != WATCHER)

REFUSED = {
    "pickles": (
        r"([c_]?[pP]ickle|cloudpickle|dill|shelve|marshal|joblib|copyreg)(\..*)?",
        r"torch\.(save|package|hub|multiprocessing|jit\.load|export\.load|serialization)(\..*)?",
        r"torch\.distributed\.(checkpoint|rpc|nn|elastic\.multiprocessing)(\..*)?",
        r"multiprocessing(\..*)?",  # hands its arguments over as pickles; tests may, within one machine
        r"pandas\.read_pickle",
        r"(.*\.)?(load_checkpoint|save_checkpoint)",  # DeepSpeed's
    ),
    "runs text": (
        r"eval|exec|__import__|builtins\.(eval|exec|__import__)",
        r"os\.(system|popen|exec.*|spawn.*)|subprocess\.(getoutput|getstatusoutput)|pty\.spawn",
        r"yaml\.(load|load_all|full_load|full_load_all|unsafe_load|unsafe_load_all|Loader|UnsafeLoader)",
    ),
    "listens or fetches": (
        r"(socketserver|http\.server|xmlrpc|asyncio\.(start_\w*server|open_\w*connection))(\..*)?",
        r"socket\.(create_server|create_connection|fromfd)",
        r"(urllib\.request|http\.client|ftplib|requests|httpx|aiohttp|huggingface_hub)(\..*)?",
    ),
    "unpacks anywhere": (r"(.*\.)?(extractall|unpack_archive)",),
}
OBJECTS = re.compile(r"((all_)?gather_object|\w+_object_list|_tensor_to_object|_object_to_tensor)")
ONLY = {
    "weights_only": True,
    "allow_pickle": False,
    "trust_remote_code": False,
    "shell": False,
    "safe_serialization": True,
}
NEEDED = {"torch.load": "weights_only"}
CALLED = ("socket.socket",)  # as a type it is harmless


def complaints(source: str) -> list[str]:
    """What a file does that none of ours may, each with its line."""
    tree = ast.parse(source)
    known = dict(_imported(tree))
    return [
        f"line {node.lineno}: {what}"
        for node in ast.walk(tree)
        if hasattr(node, "lineno")
        for what in _said(node, known)
    ]


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names and what they stand for: ``import numpy as np`` is ("np", "numpy")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _spelled(node: ast.AST, known: dict[str, str]) -> str | None:
    """The full name of ``a.b.c``, by the imports of the file; ``?.c`` of something that is no name."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_spelled(node.value, known) or '?'}.{node.attr}"
    return None


def _said(node: ast.AST, known: dict[str, str]) -> Iterator[str]:
    """What one node of a tree does wrong."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Name | ast.Attribute):
        names = [_spelled(node, known) or ""]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and OBJECTS.fullmatch(node.value):
        yield f"names {node.value}, which pickles"
    for name in names:
        yield from (
            f"{name} {why}" for why, rules in REFUSED.items() if any(re.fullmatch(rule, name) for rule in rules)
        )
        if OBJECTS.fullmatch(name.rpartition(".")[2]):
            yield f"{name} pickles"
    if isinstance(node, ast.Call):
        yield from _asked(node, known)


def _asked(call: ast.Call, known: dict[str, str]) -> Iterator[str]:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    for name, value in given.items():
        if name in ONLY and not (isinstance(value, ast.Constant) and value.value is ONLY[name]):
            yield f"{name} is not {ONLY[name]}"
    name = _spelled(call.func, known)
    if name in CALLED:
        yield f"{name} is opened"
    if name in NEEDED and NEEDED[name] not in given:
        yield f"{name} without {NEEDED[name]}={ONLY[NEEDED[name]]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_source_reads_pickles_runs_text_listens_or_fetches(file: Path) -> None:
    """One such line, and a file from a stranger or a note in the store becomes a program that runs here."""
    assert not complaints(file.read_text())


BAD = """
import pickle
import cPickle
import dill as d
import cloudpickle
import shelve
import marshal
import joblib
from pickle import loads
from torch import save
import torch; torch.save({}, "x")
import torch; torch.load("x")
import torch as t; t.load("x", weights_only=False)
import torch; torch.load("x", weights_only=flag)
from torch import load; load("x")
from torch.serialization import pickle
import torch.distributed as dist; dist.all_gather_object([], 1)
import torch.distributed as dist; dist.gather_object(1)
from torch.distributed import broadcast_object_list
import torch.distributed as dist; dist.scatter_object_list([], [])
import torch.distributed as dist; dist.send_object_list([])
import torch.distributed as dist; dist.recv_object_list([])
group.broadcast_object_list([])
getattr(dist, "all_gather_object")([], 1)
from torch.distributed.distributed_c10d import _tensor_to_object
import torch.distributed.checkpoint as dcp; dcp.load({})
import torch.distributed.checkpoint
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict_saver import save
import torch; torch.distributed.checkpoint.save({})
from torch.distributed import rpc
import torch.distributed.rpc as rpc
from torch.distributed.nn import RemoteModule
import torch; torch.hub.load("a/b", "c")
import torch; torch.jit.load("x")
from torch import multiprocessing
import multiprocessing
from multiprocessing import get_context
engine.load_checkpoint("x")
engine.save_checkpoint("x")
import pandas as pd; pd.read_pickle("x")
import numpy as np; np.load("x", allow_pickle=True)
import numpy as np; np.load("x", allow_pickle=flag)
eval("1")
exec("1")
__import__("os")
import builtins; builtins.eval("1")
import os; os.system("x")
from os import popen
import subprocess; subprocess.run("x", shell=True)
import subprocess; subprocess.getoutput("x")
import yaml; yaml.load("x")
from yaml import unsafe_load
AutoModel.from_pretrained("x", trust_remote_code=True)
AutoModel.from_pretrained("x", trust_remote_code=flag)
model.save_pretrained("x", safe_serialization=False)
import http.server
from socketserver import TCPServer
import socket; s = socket.socket(); s.listen()
import asyncio; asyncio.start_server(f)
from socket import create_server
import urllib.request
import requests
from huggingface_hub import hf_hub_download
import tarfile; tarfile.open("x").extractall()
import shutil; shutil.unpack_archive("x")
"""
GOOD = """
model.eval()
import torch; torch.load("x", weights_only=True)
import numpy as np; np.load("x"); np.load("y", allow_pickle=False)
from ringflash import recipe; recipe.load("x")
import subprocess; subprocess.run(["x"], shell=False)
import ast; ast.literal_eval("1")
import socket; socket.gethostname(); socket.socketpair(); x: socket.socket
import torch.distributed as dist; dist.all_gather([], x)
from .pickle import jar
import re; re.compile("x")
import yaml; yaml.safe_load("x")
"""


@pytest.mark.parametrize("line", BAD.strip().splitlines())
def test_each_refused_line_is_found(line: str) -> None:
    """A search that misses one spelling of it promises nothing."""
    assert complaints(line)


@pytest.mark.parametrize("line", GOOD.strip().splitlines())
def test_harmless_lines_pass(line: str) -> None:
    """A search that cries at everything is soon switched off."""
    assert not complaints(line)


def test_every_folder_of_sources_is_searched() -> None:
    """A new folder of sources that the search does not know would be free to do all of it."""
    found = {
        f.name for f in ROOT.iterdir() if not f.name.startswith(".") and f.is_dir() and next(f.rglob("*.py"), None)
    }
    assert found - {"runs", "build", "dist"} == {folder.split("/")[0] for folder in FOLDERS}
    assert len(FILES) > 100


def test_tokens_that_do_not_fit_are_refused() -> None:
    """A token file of uint64 with a damaged number would come out as a negative token, or a float as its floor."""
    damaged = np.array([1, 2, 2**64 - 1, 4], dtype=np.uint64)
    with pytest.raises(ValueError, match=r"documents\[0\] is uint64 and has 18446744073709551615"):
        list(PackedLoader(Tokens(damaged, [0, 4]), 4, (0, 1), drop_last=True))
    with pytest.raises(ValueError, match="PackingCollator: example 0 is uint64 and has 18446744073709551615"):
        PackingCollator(4)([damaged])
    fitting = PackedLoader(Tokens(damaged % 7, [0, 4]), 4, (0, 1), drop_last=True)
    assert next(iter(fitting))["input_ids"].tolist() == [[1, 2, 1, 4]]

    class Halves:
        lengths = (4,)

        def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            return (np.arange(start, stop) / 2,) * 2

    with pytest.raises(TypeError, match=r"documents\[0\] is float64 of shape \(4,\); integers"):
        list(PackedLoader(Halves(), 4, (0, 1), drop_last=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows_done": 5}, "5 rows of epoch 0 are done, and it has 4"),
        ({"rows_done": 1 << 62}, "rows of epoch 0 are done, and it has 4"),
        ({"rows_done": -1}, "rows_done of the state is -1"),
        ({"rows_done": "1"}, "rows_done of the state is '1'; an integer"),
        ({"rows_done": None}, "rows_done of the state is None"),
        ({"epoch": 0.5}, "epoch of the state is 0.5; an integer"),
        ({"order": []}, "what state_dict"),
    ],
)
def test_a_damaged_place_in_the_data_is_refused(change: dict[str, object], message: str) -> None:
    """One wrong digit in a checkpoint would skip an epoch, or part of one, without a word."""
    loader = PackedLoader([[1, 2, 3]] * 4, 3, (0, 1), pad_token=0)
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        loader.load_state_dict({**loader.state_dict(), **change})
        list(loader)


def test_the_last_place_in_an_epoch_is_accepted() -> None:
    """A run may stop behind the last batch of an epoch; it goes on with the next one."""
    loader = PackedLoader([[1, 2, 3]] * 4, 3, (0, 1), pad_token=0)
    loader.load_state_dict({**loader.state_dict(), "rows_done": 4})
    assert list(loader) == [] and loader.epoch == 1 and len(list(loader)) == 4


@pytest.mark.slow
def test_a_step_unpickles_opens_and_starts_nothing() -> None:
    """What the sources do not say, torch might do for them: real processes are watched while they hand shake, hop and sum."""
    output = torchrun(2, WATCHER)
    assert "rank 0 saw []" in output and "rank 1 saw []" in output, output


def test_notes_of_strangers_are_text_that_is_capped_and_skipped() -> None:
    """Whoever reaches the port of the store can write there: nothing that stands there may be more than a wrong sentence."""
    store = dist.HashStore()
    board = StoreBoard(store, 0, 2, seconds=1.0)
    store.set("long", "x" * (LONGEST + 1))
    with pytest.raises(ValueError, match=f"{LONGEST + 1:,} bytes under 'long'"):
        board.read(["long"])
    line = json.dumps({"rank": 1, "at": time.time(), "trouble": "cos\nsystem\n(S'true'\ntR." + "x" * 5000})
    store.set("ringflash/failures", '\n[1]\nnull\n{"rank": "x"}\n{"at": 1}\n\x80\x04K\x01.\n' + line + "\n")
    told = board.distress("a fault")
    assert "rank 1: cos" in told and len(told) < 1500
