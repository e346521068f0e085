"""The language model's tokenizer: whether it is there and the model's own, and its image token."""

from collections.abc import Iterator
from typing import Any

from .language import KEY, LanguageSource
from .sources import one_line

IMAGE_TOKEN = "<image>"

# Each set holds a whole vocabulary; transformers reads any of them.
_VOCABULARY_FILES = (
    ("tokenizer.json",),
    ("*.model",),
    ("vocab.json", "merges.txt"),
    ("vocab.txt",),
    ("*.tiktoken",),
    ("tekken.json",),
)
_PROBE = "What is shown in this image? A red car, 2 people."


def open_tokenizer(language: LanguageSource) -> Any:
    """The tokenizer of a language model, without an image token of ours.

    transformers makes an empty tokenizer of a folder that holds none, so the files are looked for here, and what the
    tokenizer does is tried.

    Raises:
        ValueError: Its files are missing or broken, or it belongs to another model: it encodes text to nothing, has
            words that the embedding has no rows for, or lacks the token that ends the model's answers.
    """
    from transformers import AutoTokenizer

    folder = language.folder
    if not any(all(any(folder.glob(name)) for name in names) for names in _VOCABULARY_FILES):
        raise ValueError(
            f"{KEY}: {folder} holds no tokenizer: neither tokenizer.json, nor tokenizer.model, nor vocab.json with "
            "merges.txt. Copy the tokenizer's files (tokenizer.json, tokenizer_config.json and what is beside them) "
            "of the same model into it."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        _check(tokenizer, encoded, language)
    except _Unfit as error:
        raise ValueError(
            f"{KEY}: the tokenizer in {folder} is not this model's: {error}. Copy tokenizer.json, "
            "tokenizer_config.json and what is beside them of the same model into it."
        ) from error
    except Exception as error:  # transformers and its parsers raise whatever a broken file leads to
        raise ValueError(
            f"{KEY}: the tokenizer in {folder} cannot be opened ({one_line(error)}). Copy or download "
            "its files again, whole."
        ) from error
    return tokenizer


class _Unfit(Exception):
    """Says what does not fit."""


def _check(tokenizer: Any, encoded: list[int], language: LanguageSource) -> None:
    if not set(encoded) - {tokenizer.unk_token_id}:
        raise _Unfit(f"it encodes the text {_PROBE!r} to {'unknown tokens alone' if encoded else 'nothing'}")
    rows = language.config.vocab_size
    # Tokens that were added behind the vocabulary may lack a row (Gemma 3's image token does): they get new ones.
    added = tokenizer.get_added_vocab()
    beyond = {word: number for word, number in tokenizer.get_vocab().items() if number >= rows and word not in added}
    if beyond:
        word, number = max(beyond.items(), key=lambda item: item[1])
        raise _Unfit(f"its word {word!r} has the number {number}, vocab_size in config.json is {rows}")
    for number in _ends(language.config.eos_token_id):
        if number >= len(tokenizer):
            raise _Unfit(f"eos_token_id in config.json is {number}, and it has {len(tokenizer)} tokens")


def _ends(value: int | list[int] | None) -> Iterator[int]:
    yield from (value if isinstance(value, list) else [] if value is None else [value])


def add_image_token(tokenizer: Any) -> int:
    """Makes ``<image>`` one special token of the tokenizer; returns its id.

    A special token of that name that is there already is taken as it is.

    Raises:
        ValueError: ``<image>`` is an ordinary word of the vocabulary.
    """
    if IMAGE_TOKEN in tokenizer.get_vocab():
        if IMAGE_TOKEN not in tokenizer.get_added_vocab():
            raise ValueError(
                f"{KEY}: its tokenizer has {IMAGE_TOKEN} as an ordinary word, whose embedding means something to the "
                "model; rename that entry in the tokenizer's files, or give another language model."
            )
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
