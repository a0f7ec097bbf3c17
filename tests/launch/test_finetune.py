"""A fine-tune of a Transformers model on packed text: one curve, however it is spread, interrupted and resumed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import ROOT, torchrun

import loop
import ranks
from corpus import read_texts
from finetune_options import parse
from options import UsageError
from packed_text import PackedText, Reader, _store, read_as
from ringflash.checkpointing import keep_attention
from ringflash.tiling import Tiled

transformers = pytest.importorskip("transformers")

Curve = Callable[[Path], dict[str, list[float]]]
PROGRAM = ROOT / "launch" / "finetune_hf.py"
TOLERANCE = 1e-5  # relative, float32, six AdamW steps
SECONDS = 300

# Rows of an odd length, so that shards are uneven; several documents to a row and rows to a document.
SMALL = """
    --seq-length 151 --batch 2 --steps 6 --learning-rate 1e-3 --warmup 2 --validate-every 3 --validation-samples 4
    --log-every 1 --device cpu
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a run that takes milliseconds a step, on many short documents."""
    folder = tmp_path_factory.mktemp("short")
    lines = (ROOT / "README.md").read_text().splitlines()
    for number in range(0, 240, 3):
        (folder / f"{number:03}.txt").write_text("\n".join(lines[number : number + 3]) + f" {number}")
    return [*SMALL.split(), "--text", str(folder)]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """``here(*arguments)`` runs the program in this very process, as a grid of one; returns the folder of the run."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    def run(*arguments: object) -> Path:
        import finetune_hf

        options = parse([*map(str, arguments)])
        try:
            assert finetune_hf.main(options) == 0
        finally:
            dist.destroy_process_group()
        return options.out

    yield run


def test_a_fine_tune_resumes_on_one_process(
    small: list[str], here: Callable[..., Path], curve: Curve, tmp_path: Path
) -> None:
    """2 x 2 ranks under FSDP2 with all that saves memory, then one: the curve of one that was never interrupted.

    The packed rows are the same, none twice, and the model at the end is one that Transformers reads, with the loss it had.
    """
    out = tmp_path / "spread" / "run"
    savings = ("--checkpointing", "keep", "--loss-tile", 32, "--mlp-tile", 20)
    grid = ("--data", 2, "--context", 2, "--engine", "fsdp", "--stop-at", 3, "--check")
    output = torchrun(4, PROGRAM, *small, *grid, *savings, "--out", out, seconds=SECONDS)
    assert "exactness: equal, 4 rank(s) (data 2 x context 2, fsdp)" in output
    assert max(float(text) for text in re.findall(r"gradients (\d\.\d+e[-+]\d+)", output)) < 1e-5
    assert all(float(text) > 0.01 for text in re.findall(r"control: .* would be (\S+) off", output))
    resumed = curve(here(*small, "--resume", "--out", out))
    alone = curve(here(*small, "--out", tmp_path / "one" / "run"))
    assert resumed["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
    assert resumed["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=10 * TOLERANCE)
    assert resumed["validation"][0] == pytest.approx(alone["validation"][0], rel=TOLERANCE)
    assert alone["loss"][0] == pytest.approx(math.log(256), abs=0.3)
    assert alone["loss"][-1] < alone["loss"][0] - 0.1
    _same_model(out / "model", tmp_path / "one" / "run" / "model")
    again = here(*small, "--model", out / "model", "--stop-at", 0, "--batch", 4, "--out", tmp_path / "again" / "run")
    assert curve(again)["validation"] == pytest.approx(resumed["validation"][-1:], rel=TOLERANCE)


def _same_model(*folders: Path) -> None:
    models = [transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    assert models[0].config.architectures == ["Qwen3ForCausalLM"]
    for (name, one), other in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)
    assert json.loads((folders[0] / "config.json").read_text()) == json.loads((folders[1] / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "--engine ddp --checkpointing full",
        "--engine deepspeed --zero-stage 1 --checkpointing keep-cpu",
        "--engine deepspeed --zero-stage 2 --loss-tile 40",
        "--engine deepspeed --zero-stage 3 --mlp-tile 40 --checkpointing keep",
    ],
)
def test_a_fine_tune_on_a_grid_equals_one_process(
    small: list[str], here: Callable[..., Path], curve: Curve, tmp_path: Path, how: str
) -> None:
    """Every engine, and every way to save memory: half of the steps on 2 x 2 ranks, the others on two that share samples."""
    out = tmp_path / "spread" / "run"
    run = (*small, *how.split(), "--out", out)
    output = torchrun(4, PROGRAM, *run, "--data", 2, "--check", "--stop-at", 3, seconds=SECONDS)
    assert "exactness: equal, 4 rank(s) (data 2 x context 2" in output
    assert "3 steps, 6 samples done" in torchrun(2, PROGRAM, *run, "--resume", seconds=SECONDS)
    alone, spread = curve(here(*small, "--out", tmp_path / "one" / "run")), curve(out)
    assert spread["loss"] == pytest.approx(alone["loss"], rel=TOLERANCE)
    assert spread["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=10 * TOLERANCE)
    assert spread["validation"][-1] == pytest.approx(alone["validation"][-1], rel=TOLERANCE)


@pytest.mark.slow
def test_layers_can_be_compiled(small: list[str], tmp_path: Path) -> None:
    """The check holds with compiled layers under FSDP2, attention's results kept."""
    how = ("--engine", "fsdp", "--compile", "--checkpointing", "keep", "--check", "--stop-at", 2)
    output = torchrun(2, PROGRAM, *small, *how, "--out", tmp_path / "run", seconds=SECONDS)
    assert "exactness: equal, 2 rank(s) (data 1 x context 2, fsdp)" in output


def _tokenizer(folder: Path) -> Any:
    """Words by their bytes, of which the pairs "th" and "in" are one; 0 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<end>", *alphabet, "th", "in"])}
    words = Tokenizer(models.BPE(vocabulary, merges=[("t", "h"), ("i", "n")]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def test_a_saved_model_is_fine_tuned_with_its_own_tokenizer(
    small: list[str], here: Callable[..., Path], curve: Curve, tmp_path: Path
) -> None:
    """Documents end with its token, and with the model its tokenizer and how it generates are saved again."""
    tokenizer = _tokenizer(tmp_path / "saved")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path / "saved")
    out = here(*small, "--model", tmp_path / "saved", "--stop-at", 2, "--check", "--out", tmp_path / "run")
    assert len(curve(out)["loss"]) == 2
    assert transformers.AutoTokenizer.from_pretrained(out / "model").eos_token == "<end>"
    assert transformers.GenerationConfig.from_pretrained(out / "model").max_new_tokens == 17
    stored = max((tmp_path / "tokens").glob("*/tokens.npy"), key=lambda file: file.stat().st_size)
    tokens, offsets = np.load(stored), np.load(stored.with_name("offsets.npy"))
    assert (tokens[offsets[1:] - 1] == 0).all() and (tokens == 0).sum() == len(offsets) - 1
    assert tokenizer.decode(tokens[: offsets[1] - 1]) == (Path(small[-1]) / "000.txt").read_text()


def test_options_reach_what_they_are_for(
    small: list[str], here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Rates, clipping and what saves memory show in no comparison of two runs that both lack them."""
    made: list[Any] = []
    logits: list[Any] = []
    share = loop.share

    def watched(wrapped: Any, alone: ranks.Ranks, engine: str, optimizer: Any, **more: Any) -> Any:
        wrapped.register_forward_hook(lambda module, inputs, out: logits.append(out.logits))
        made.extend((wrapped, engine, more, share(wrapped, alone, "ddp", optimizer, **more)))
        return made[-1]

    monkeypatch.setattr(loop, "share", watched)
    zero = (
        "--engine",
        "deepspeed",
        "--zero-stage",
        3,
        "--clip",
        0.3,
        "--dtype",
        "bfloat16",
        "--learning-rate",
        4e-3,
        "--steps",
        10,
    )
    savings = ("--checkpointing", "keep", "--loss-tile", 32, "--mlp-tile", 20)
    here(*small, *zero, *savings, "--stop-at", 1, "--out", tmp_path / "run")
    wrapped, name, asked, engine = made
    assert name == "deepspeed" and asked == {"zero_stage": 3, "clip": 0.3, "autocast": True}
    assert [group["lr"] for group in engine.optimizer.param_groups] == [2e-3, 2e-3]  # ten steps warm up in two
    assert logits and all(each is None for each in logits)  # of a loss in tiles
    layer = wrapped.module.model.layers[0]
    assert isinstance(layer.mlp, Tiled)
    assert layer.gradient_checkpointing and layer._gradient_checkpointing_func.keywords["context_fn"] is keep_attention


def test_an_epoch_reads_the_training_text_once_and_no_other(small: list[str], tmp_path: Path) -> None:
    """Documents that are held out for validation are validated on, and never trained on."""
    texts = read_texts(Path(small[-1]))
    try:
        alone = ranks.start(1, None, "cpu")
        lesson = PackedText(texts, Reader(None, "bytes"), parse([*small, "--out", str(tmp_path / "run")]), alone)
        rows = -(-sum(len(text) + 1 for text in texts.train) // 151)
        trained = [lesson.batch()["input_ids"].flatten() for _ in range(-(-rows // 2))]
        validated = [batch["input_ids"].flatten() for batch in lesson.validation()]
    finally:
        dist.destroy_process_group()
    assert sorted(bytes(torch.cat(trained).tolist()).rstrip(b"\0").split(b"\0")) == sorted(texts.train)
    held_out = b"\0".join(texts.validation)
    assert bytes(torch.cat(validated).tolist())[: len(held_out)] == held_out[: 4 * 151]


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    """Transformers would make one that knows no words, and every text would be empty; bytes are for a vocabulary of bytes."""
    transformers.Qwen3Config(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer"):
        read_as(tmp_path, 300)
    assert read_as(tmp_path, 256).tokenizer is None


def test_tokens_that_have_changed_on_the_disk_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their folder is named by what they were made from: a flipped bit in them would be trained on."""
    alone: Any = SimpleNamespace(once=lambda what, work: work(), say=print, rank=0)
    texts = [b"one text", b"another"]
    made = np.array(_store(texts, Reader(None, "bytes"), tmp_path, alone).tokens)
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"x"), lambda file: file.unlink()):
        damage(next(tmp_path.glob("*/tokens.npy")))
        assert (_store(texts, Reader(None, "bytes"), tmp_path, alone).tokens == made).all()
        assert re.search(r"tokens: \S+ is made again: tokens.npy (is damaged|cannot be read)", capsys.readouterr().out)
    _store(texts, Reader(None, "bytes"), tmp_path, alone)
    assert capsys.readouterr().out == ""


def test_a_saved_model_brings_neither_code_nor_pickles(tmp_path: Path) -> None:
    """Whoever made the folder of --model can do no more harm than wrong numbers; nothing is asked on a terminal."""
    from finetune_hf import _config, _model

    transformers.Qwen3Config(vocab_size=64, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    options = parse(["--model", str(tmp_path)])
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        _model(options, _config(options), "sdpa")
    for config in (tmp_path / "config.json", tmp_path / "tokenizer_config.json"):
        own = {"auto_map": {"AutoConfig": "theirs.Config", "AutoTokenizer": ["theirs.T", None]}, "model_type": "theirs"}
        config.write_text(json.dumps(own))
    (tmp_path / "theirs.py").write_text("raise SystemExit")
    with pytest.raises(UsageError, match=r"trust_remote_code|custom code"):
        _config(options)
    with pytest.raises(UsageError, match=r"trust_remote_code|custom code"):
        read_as(tmp_path, 64)


def test_text_without_a_token_to_predict_is_refused(
    small: list[str], here: Callable[..., Path], tmp_path: Path
) -> None:
    """An empty file would be trained on with a loss of zero."""
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UsageError, match="no document has two tokens"):
        here(*small, "--text", tmp_path / "empty.txt", "--out", tmp_path / "run")


def test_the_check_leaves_nothing_to_chance(small: list[str], here: Callable[..., Path], tmp_path: Path) -> None:
    """A model with dropout is compared without it, and trained with it."""
    here(*small, "--model-type", "gpt2", "--check", "--stop-at", 0, "--out", tmp_path / "run")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "run" / "model").resid_pdrop == 0.1


def test_the_check_notices_a_wrong_gradient(
    small: list[str], here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A check that cannot fail proves nothing: half a gradient of one parameter ends the run before it trains."""
    import exactness_hf

    share = exactness_hf.share

    def sabotaged(wrapped: Any, *arguments: Any, **more: Any) -> Any:
        wrapped.get_parameter("model.layers.1.mlp.up_proj.weight").register_hook(lambda gradient: gradient / 2)
        return share(wrapped, *arguments, **more)

    monkeypatch.setattr(exactness_hf, "share", sabotaged)
    with pytest.raises(AssertionError):
        here(*small, "--check", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--model-type nonsense", r"--model-type: .*nonsense"),
        ("--model-type mamba", r"mamba models are not supported"),
        ("--heads-degree 3", r"--heads-degree 3 ranks cannot share the model's 4 heads equally"),
        ("--seq-length 1", r"--seq-length 1 is too short"),
    ],
)
def test_a_model_that_cannot_be_spread_is_refused_by_name(
    small: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, sentence: str
) -> None:
    """One sentence that says what was asked for and why it cannot be."""
    import finetune_hf

    with pytest.raises(UsageError, match=sentence):
        try:
            finetune_hf.main(parse([*small, *line.split(), "--out", str(tmp_path / "run")]))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def test_a_resume_with_another_model_is_refused(
    small: list[str], here: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Field by field, as train.py does; and nothing of the run is touched."""
    out = here(*small, "--stop-at", 1, "--out", tmp_path / "run")
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match=r"model model_type: 'qwen3' there, 'llama' here.*data seed: 0 there, 1 here"):
        here(*small, "--resume", "--model-type", "llama", "--seed", 1, "--out", out)
    assert (out / "metrics.jsonl").read_text() == before
