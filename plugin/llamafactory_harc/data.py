"""The rows of a HARC run: classes, positions, truncation, the fixed mixture in each batch, and the collator."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import DataCollatorForSeq2Seq

from llamafactory_hera.heads.tokens import IGNORE_INDEX

from .config import HarcConfig

#: The classes of rows. HARC trains only on the first three.
KINDS = HARMFUL, HARMLESS, PSEUDO, COMPLIANT = ("harmful", "harmless", "pseudo", "compliant")
_RATIO = {HARMFUL: 3, HARMLESS: 2, PSEUDO: 1}  # the authors' 6 + 4 + 2
#: The prefix of every added tensor; ``Coupler.prepare`` removes these tensors before the model sees the batch.
PREFIX = "harc_"


class Row(NamedTuple):
    """A tokenized row. It is not a mapping, so a Trainer does not remove any of its columns."""

    ids: list[int]
    n_prompt: int  #: The number of tokens before the response.
    kind: str


Rows = Mapping[str, Sequence[Row]]  #: Rows by class.


def template_tail(render: Callable[[str], list[int]]) -> list[int]:
    """Returns the template's tokens between the user's text and the response; ``render`` encodes a prompt."""
    first, second = render("What is a river?"), render("Count from 1 to 7")
    length = 0
    while first[len(first) - length - 1 :] == second[len(second) - length - 1 :]:
        length += 1
    if not length:
        raise ValueError("template: no token after the user's text separates harm from refusal; use another template.")
    return first[-length:]


def chat_tail(tokenizer: Any) -> list[int]:
    """Returns the ``template_tail`` of a tokenizer's chat template."""

    def render(text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tokenizer(prompt, add_special_tokens=False)["input_ids"]

    return template_tail(render)


def read_rows(dataset: Iterable[Mapping[str, Any]], tail: Sequence[int], config: HarcConfig) -> tuple[Rows, Rows]:
    """Reads tokenized rows with labels (or TRL's ``completion_mask``) and their class.

    Returns rows that define the directions and rows to train on, both by class. Raises ``ValueError`` for bad data.
    """
    rows: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    for number, row in enumerate(dataset):
        if (kind := row.get(config.column)) not in KINDS:
            raise ValueError(f"harc_column: row {number} has {config.column}: {kind!r}; use {', '.join(KINDS)}.")
        try:
            rows[kind].append(_read_row(row, kind, tail, config.length))
        except ValueError as error:
            raise ValueError(f"dataset: row {number} ({kind}) {error}") from error
    harmful, harmless = len(rows[HARMFUL]), len(rows[HARMLESS])
    if min(harmful, harmless) < 2 or not rows[COMPLIANT]:
        raise ValueError(
            f"dataset: it has {', '.join(f'{len(each)} {kind}' for kind, each in rows.items())} rows, but HARC needs "
            "at least 2 harmful and 2 harmless (half of both define directions) and 1 compliant; add rows."
        )
    held = {kind: min(config.extract_samples, len(rows[kind]) // 2) for kind in (HARMFUL, HARMLESS)}
    held[COMPLIANT] = config.extract_samples
    extract = {kind: rows[kind][:count] for kind, count in held.items()}
    return extract, {kind: rows[kind][held.get(kind, 0) :] for kind in _RATIO}


def _read_row(row: Mapping[str, Any], kind: str, tail: Sequence[int], length: int) -> Row:
    ids, labels = list(row["input_ids"]), row.get("labels")
    answer = row.get("completion_mask") if labels is None else [label != IGNORE_INDEX for label in labels]
    start = next((place for place, answered in enumerate(answer or ()) if answered), None)
    if answer is None:
        raise ValueError("has neither labels nor TRL's completion_mask; provide prompt and completion columns.")
    if start is None:
        raise ValueError("has no response; every row needs a prompt and a response.")
    if not all(answer[start:]):
        raise ValueError("has several turns; split it, because HARC reads one prompt and one response.")
    if list(tail) != ids[max(start - len(tail), 0) : start]:
        raise ValueError("has a prompt that does not end with the template's tail; use one template for all rows.")
    prompt, response = ids[:start][-length:], ids[start:]
    if len(prompt) <= len(tail):
        raise ValueError("has a prompt without a token before the template's tail; write a longer prompt.")
    if len(response) > length + 1:
        response = [*response[:length], response[-1]]
    return Row([*prompt, *response], len(prompt), kind)


class HarcCollator:
    """Pads rows, and adds ``harc_harmful [B]``, ``harc_positions [B, 2]`` and the response mask ``harc_response``.

    The positions are the last tokens of the instruction and of the prompt. Only harmful rows keep their labels. The
    collator removes all other labels, because Trainers count labels before the step.
    """

    def __init__(self, tokenizer: Any, n_tail: int) -> None:
        self._pad, self._n_tail = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8), n_tail

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        labels = ([IGNORE_INDEX] * row.n_prompt + row.ids[row.n_prompt :] for row in rows)
        batch = dict(self._pad([{"input_ids": row.ids, "labels": next(labels)} for row in rows]))
        response = batch["labels"] != IGNORE_INDEX
        last = response.int().argmax(dim=1) - 1  # on either side of the padding
        harmful = torch.tensor([row.kind == HARMFUL for row in rows])
        batch["labels"][~harmful] = IGNORE_INDEX
        positions = torch.stack([last - self._n_tail, last], dim=1)
        return batch | {"harc_harmful": harmful, "harc_positions": positions, "harc_response": response}


def reading_mask(inputs: Mapping[str, Tensor], window: int) -> Tensor:
    """Returns masks ``[3 * B, B * T]`` of the tokens to average for each row: instruction, prompt, response start."""
    response = inputs["harc_response"]
    index, places = (torch.arange(size, device=response.device) for size in response.shape)
    start = response & (response.cumsum(dim=1) <= window)
    mask = response.new_zeros(len(index), 3, len(index), len(places))
    mask[index, :, index] = torch.cat([places == inputs["harc_positions"].unsqueeze(-1), start.unsqueeze(1)], dim=1)
    return mask.flatten(0, 1).flatten(1)


class MixtureSampler(Sampler[int]):
    """Yields indices such that each batch has harmful, harmless and pseudo rows in the ratio 6 : 4 : 2.

    Each class is an endless stream of shuffled passes, which a resumed run continues. An epoch ends when every harmful
    row has been seen. The indices refer to the concatenation of the classes in ``train``.
    """

    def __init__(self, train: Rows, batch_size: int, n_processes: int, seed: int) -> None:
        unit = sum(_RATIO.values())
        if batch_size % unit:
            raise ValueError(f"per_device_train_batch_size: {batch_size} is not a multiple of {unit} (3 + 2 + 1).")
        shares = [batch_size // unit * share for share in _RATIO.values()]
        if not train[PSEUDO]:
            shares = [shares[0], batch_size - shares[0], 0]
        counts = [len(train[kind]) for kind in _RATIO]
        self._streams = [*zip(shares, counts, (0, counts[0], counts[0] + counts[1]), strict=True)]
        self._n_batches = -(-counts[0] // (shares[0] * n_processes)) * n_processes
        self._batch_size, self._seed, self._epoch = batch_size, seed, 0

    def __len__(self) -> int:
        return self._n_batches * self._batch_size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; accelerate calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        streams = [self._stream(*stream) for stream in self._streams]
        for _ in range(self._n_batches):
            for (share, _, _), stream in zip(self._streams, streams, strict=True):
                yield from (next(stream) for _ in range(share))

    def _stream(self, share: int, count: int, first: int) -> Iterator[int]:
        position = self._epoch * self._n_batches * share
        while True:
            passed, place = divmod(position, count)
            generator = torch.Generator().manual_seed(hash((self._seed, first, passed)) % 2**63)
            yield first + int(torch.randperm(count, generator=generator)[place])
            position += 1
