"""The rows of a HARC run: their classes, positions and truncation, the fixed mixture of a batch, and the collator."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llamafactory_hera.heads.tokens import IGNORE_INDEX

from .config import HarcConfig

#: The classes of rows. Only the first three are trained on.
KINDS = HARMFUL, HARMLESS, PSEUDO, COMPLIANT = ("harmful", "harmless", "pseudo", "compliant")
_RATIO = {HARMFUL: 3, HARMLESS: 2, PSEUDO: 1}  # the authors' 6 + 4 + 2
#: The prefix of every added tensor; ``Coupler.prepare`` removes these tensors before the model sees the batch.
PREFIX = "harc_"


class Row(NamedTuple):
    """A row as tokens. It is no mapping, so a Trainer removes no column of it."""

    ids: list[int]
    n_prompt: int  #: The number of tokens before the response.
    kind: str


class Rows(NamedTuple):
    """The rows by class: those that define the directions, and those to train on."""

    extract: dict[str, list[Row]]
    train: dict[str, list[Row]]


def template_tail(render: Callable[[str], list[int]]) -> list[int]:
    """Returns the template's tokens between the user's text and the response; ``render`` encodes a prompt."""
    first, second = (render(text) for text in ("What is a river?", "Count from 1 to 7"))
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    if not length:
        raise ValueError(
            "template: no token follows the user's text, so harm and refusal have one position; change it."
        )
    return first[-length:]


def chat_tail(tokenizer: Any) -> list[int]:
    """Returns the :func:`template_tail` of a tokenizer's chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("tokenizer: it has no chat template, so the end of the user's text is unknown; give it one.")

    def render(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]

    return template_tail(render)


def named_kind(name: str) -> str | None:
    """Returns the class that a dataset's name contains, or None unless there is exactly one."""
    found = [kind for kind in KINDS if kind in name.lower()]
    return found[0] if len(found) == 1 else None


def read_rows(dataset: Iterable[Mapping[str, Any]], tail: Sequence[int], config: HarcConfig) -> Rows:
    """Reads tokenized rows with labels (or TRL's ``completion_mask``) and their class, and splits them by purpose.

    Raises:
        ValueError: A class or a response is missing, a prompt does not end as the template does, or a class is empty.
    """
    by_kind: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for number, row in enumerate(dataset):
        kind = row.get(config.column)
        if kind not in KINDS:
            raise ValueError(
                f"harc_column: row {number} of the data has {config.column}: {kind!r}; write {', '.join(KINDS)}."
            )
        by_kind[kind].append(_read_row(row, f"dataset: row {number} ({kind})", kind, tail, config))
    harmful, harmless = len(by_kind[HARMFUL]), len(by_kind[HARMLESS])
    if harmful < 2 or harmless < 2 or not by_kind[COMPLIANT]:
        counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in by_kind.items())
        raise ValueError(
            f"dataset: it has {counts} rows. HARC needs at least 2 harmful and 2 harmless rows (half of them define the "
            "directions), and 1 compliant row (for the direction of harm over the response)."
        )
    held = {kind: min(config.extract_samples, len(by_kind[kind]) // 2) for kind in (HARMFUL, HARMLESS)}
    held[COMPLIANT] = config.extract_samples
    return Rows(
        {kind: by_kind[kind][:count] for kind, count in held.items()},
        {kind: by_kind[kind][held.get(kind, 0) :] for kind in _RATIO},
    )


def _read_row(row: Mapping[str, Any], where: str, kind: str, tail: Sequence[int], config: HarcConfig) -> Row:
    ids = list(row["input_ids"])
    if row.get("labels") is not None:
        answer = [label != IGNORE_INDEX for label in row["labels"]]
    elif row.get("completion_mask") is not None:
        answer = [bool(value) for value in row["completion_mask"]]
    else:
        raise ValueError(f"{where} says nowhere where its response begins; give a prompt and a completion.")
    if not any(answer):
        raise ValueError(f"{where} has no response; every row needs one.")
    start = answer.index(True)
    if False in answer[start:]:
        raise ValueError(f"{where} has several turns; split it, because HARC reads one prompt and one response.")
    if list(tail) != ids[max(start - len(tail), 0) : start]:
        raise ValueError(f"{where}: its prompt does not end with the template's tail; use one template for all rows.")
    prompt, response = ids[:start][-config.length :], ids[start:]
    if len(prompt) <= len(tail):
        raise ValueError(f"{where}: its prompt has no token before the template's tail; write a longer one.")
    if len(response) > config.length + 1:
        response = [*response[: config.length], response[-1]]
    return Row([*prompt, *response], len(prompt), kind)


class HarcCollator:
    """Pads rows and adds what HARC reads, as tensors with the prefix ``harc_``.

    - ``harc_harmful [B]``: true for harmful rows.
    - ``harc_positions [B, 2]``: the last token of the instruction, and that of the prompt.
    - ``harc_response [B, T]``: the tokens of the response.

    Only harmful rows keep labels. They are removed here, and not in the step, because Trainers count them before.
    """

    def __init__(self, pad: Callable[[list[dict[str, Any]]], Mapping[str, Any]], n_tail: int) -> None:
        self._pad, self._n_tail = pad, n_tail

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        features = [
            {
                "input_ids": row.ids,
                "attention_mask": [1] * len(row.ids),
                "labels": [IGNORE_INDEX] * row.n_prompt + row.ids[row.n_prompt :],
            }
            for row in rows
        ]
        batch = dict(self._pad(features))
        response = batch["labels"] != IGNORE_INDEX
        last = response.int().argmax(dim=1) - 1  # wherever the padding is
        harmful = torch.tensor([row.kind == HARMFUL for row in rows])
        batch["labels"] = batch["labels"].masked_fill(~harmful.unsqueeze(1), IGNORE_INDEX)
        positions = torch.stack([last - self._n_tail, last], dim=1)
        return batch | {"harc_harmful": harmful, "harc_positions": positions, "harc_response": response}


def reading_mask(positions: Tensor, response: Tensor, window: int) -> Tensor:
    """Returns the tokens to average ``[3 * B, B * T]`` for each row: instruction, prompt, start of the response."""
    n_rows, length = response.shape
    places = torch.arange(length, device=response.device)
    start = response & (response.cumsum(dim=1) <= window)
    read = torch.cat([places == positions.unsqueeze(-1), start.unsqueeze(1)], dim=1)
    mask = torch.zeros(n_rows, 3, n_rows, length, dtype=torch.bool, device=response.device)
    index = torch.arange(n_rows, device=response.device)
    mask[index, :, index] = read
    return mask.view(3 * n_rows, n_rows * length)


class MixtureSampler(Sampler[int]):
    """Yields indices such that each batch has harmful, harmless and pseudo rows in the ratio 6 : 4 : 2.

    Each class is an endless stream of shuffled passes. An epoch ends when every harmful row was seen. The indices
    depend on the seed and the epoch alone, so a resumed run continues the streams.

    Args:
        train: The rows by class; the dataset is their concatenation in this order.
        batch_size: Rows in a batch of one process.
        n_processes: The number of processes, which share the batches of an epoch evenly.
        seed: The seed of all permutations.
    """

    def __init__(self, train: Mapping[str, Sequence[Row]], batch_size: int, n_processes: int, seed: int) -> None:
        unit = sum(_RATIO.values())
        if batch_size % unit:
            raise ValueError(
                f"per_device_train_batch_size: {batch_size} cannot hold 3 harmful, 2 harmless and 1 pseudo row in that "
                f"ratio; choose a multiple of {unit}."
            )
        shares = {kind: batch_size // unit * share for kind, share in _RATIO.items()}
        if not train[PSEUDO]:
            shares = {HARMFUL: shares[HARMFUL], HARMLESS: batch_size - shares[HARMFUL]}
        starts, start = {}, 0
        for kind, rows in train.items():
            starts[kind], start = start, start + len(rows)
        self._streams = [(starts[kind], len(train[kind]), share) for kind, share in shares.items()]
        per_step = shares[HARMFUL] * n_processes
        self._n_batches = -(-len(train[HARMFUL]) // per_step) * n_processes
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return self._n_batches * self._batch_size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; accelerate calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._n_batches
        streams = [
            self._stream(number, start, count, first * share)
            for number, (start, count, share) in enumerate(self._streams)
        ]
        for _ in range(self._n_batches):
            for stream, (_, _, share) in zip(streams, self._streams, strict=True):
                for _ in range(share):
                    yield next(stream)

    def _stream(self, number: int, start: int, count: int, position: int) -> Iterator[int]:
        while True:
            passes, place = divmod(position, count)
            generator = torch.Generator().manual_seed(hash((self._seed, number, passes)) % 2**63)
            order = torch.randperm(count, generator=generator).tolist()
            yield from (start + index for index in order[place:])
            position += count - place
