"""`build` looks at what it is given before it makes anything: each fault names its option, value and remedy."""

import json
import shutil
from pathlib import Path

import pytest

from .test_build_faults import build
from .tiny import new_tokenizer, save_language_model


def refused(checkpoints: dict, output: Path, match: str, **options) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        build(checkpoints, output, **options)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()
    return str(caught.value)


def copy(folder: Path, target: Path) -> Path:
    return shutil.copytree(folder, target)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_language_model_without_its_tokenizer_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    for file in llm.glob("tokenizer*"):
        file.unlink()
    message = refused(checkpoints, tmp_path / "built", rf"--language-model: {llm} holds no tokenizer", llm=llm)
    assert "neither tokenizer.json, nor tokenizer.model" in message
    assert "Copy the tokenizer's files" in message
    (llm / "vocab.json").write_text(json.dumps(new_tokenizer("qwen3").get_vocab()))
    refused(checkpoints, tmp_path / "built", "nor vocab.json with merges.txt", llm=llm)
    (llm / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    refused(checkpoints, tmp_path / "built", r"--language-model: the tokenizer in .* cannot be opened", llm=llm)


def test_a_tokenizer_of_another_model_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    small = save_language_model("qwen3", tmp_path / "small", rows=390, pad_token_id=None)
    refused(checkpoints, tmp_path / "built", r"has the number 399, vocab_size in config.json is 390", llm=small)

    other = save_language_model("qwen3", tmp_path / "other", rows=1000, eos_token_id=[2, 900])
    refused(checkpoints, tmp_path / "built", r"eos_token_id in config.json is 900, and it has 403 tokens", llm=other)

    empty = copy(checkpoints["qwen3"], tmp_path / "empty")
    tokenizer = json.loads((empty / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    (empty / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(checkpoints, tmp_path / "built", r"encodes the text 'What .*' to nothing", llm=empty)


def test_a_token_that_was_added_behind_the_embedding_gets_a_row(checkpoints: dict, tmp_path: Path) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    tokenizer = new_tokenizer("qwen3").from_pretrained(llm)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.save_pretrained(llm)
    assert build(checkpoints, tmp_path / "built", llm=llm).image_token_id == 404
