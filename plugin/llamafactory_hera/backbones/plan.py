"""The tensors of a built model: each with its name, shape and dtype, and how it is made when its turn comes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .language import EMBEDDING, HEAD, LanguageSource
from .sources import StoredTensor, one_line
from .vision import VisionSource

PROJECTOR = "multi_modal_projector."


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the output.

    Attributes:
        name: Inside the LLaVA checkpoint.
        shape: Its shape.
        dtype: Its dtype.
        source: What decides its values, as text.
        make: Reads or computes it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: str
    make: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_tensors(language: LanguageSource, vision: VisionSource, config: Any, seed: int) -> list[PlannedTensor]:
    """Every tensor of the model, in the order in which they are written.

    Args:
        language: Its weights go in bit by bit, in their dtype; its embeddings get the rows that they lack.
        vision: Its weights go in bit by bit, in their dtype.
        config: Of the whole model.
        seed: Of the projector's random weights.

    Raises:
        ValueError: A tensor is missing, left over, or of another shape than the configuration says.
    """
    planned = []
    vocabulary = config.text_config.vocab_size
    for name, tensor in language.tensors.items():
        if name in (EMBEDDING, HEAD) and vocabulary > tensor.shape[0]:
            planned.append(_grown(name, tensor, vocabulary))
        else:
            planned.append(_copied(name, tensor))
    planned += [_copied(name, tensor) for name, tensor in vision.tensors.items()]
    planned += _projector(vision.config.hidden_size, language.config.hidden_size, language.dtype, seed)
    _check(planned, config, language, vision)
    return planned


def _copied(name: str, tensor: StoredTensor) -> PlannedTensor:
    return PlannedTensor(name, tensor.shape, tensor.dtype, tensor.identity, tensor.read)


def _grown(name: str, tensor: StoredTensor, rows: int) -> PlannedTensor:
    def make() -> Tensor:
        old = tensor.read()
        # the mean, so that a new token is as likely and as large as an average one
        mean = old.mean(dim=0, dtype=torch.float32).to(old.dtype)
        return torch.cat([old, mean.expand(rows - old.shape[0], -1)])

    return PlannedTensor(name, (rows, *tensor.shape[1:]), tensor.dtype, tensor.identity, make)


def _projector(width: int, hidden: int, dtype: torch.dtype, seed: int) -> Iterator[PlannedTensor]:
    """Two linear layers with PyTorch's default initialisation, as LLaVA-1.5 begins."""
    shapes = {
        "linear_1.weight": (hidden, width),
        "linear_1.bias": (hidden,),
        "linear_2.weight": (hidden, hidden),
        "linear_2.bias": (hidden,),
    }
    for number, (name, shape) in enumerate(shapes.items()):
        bound = 1 / math.sqrt(width if name.startswith("linear_1") else hidden)

        def make(shape: tuple[int, ...] = shape, bound: float = bound, number: int = number) -> Tensor:
            # a generator for each tensor: a resumed build draws the same numbers
            generator = torch.Generator().manual_seed(seed * len(shapes) + number)
            return torch.empty(shape).uniform_(-bound, bound, generator=generator).to(dtype)

        yield PlannedTensor(PROJECTOR + name, shape, dtype, f"random, seed {seed}", make)


def _check(planned: list[PlannedTensor], config: Any, language: LanguageSource, vision: VisionSource) -> None:
    from transformers import LlavaForConditionalGeneration

    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(config)
    except Exception as error:  # each model class has its own checks and errors
        raise ValueError(
            f"--language-model, --vision-model: no model can be made of config.json in {language.folder} and in "
            f"{vision.folder} ({one_line(error)}). Correct the value, or copy or download them again, whole."
        ) from error
    tied = {"lm_head.weight"} if language.tied else set()
    prefixes = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": vision.tower.stored_prefix,
        "model.multi_modal_projector.": PROJECTOR,
    }
    expected = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            own, stored = next((own, stored) for own, stored in prefixes.items() if name.startswith(own))
            expected[stored + name.removeprefix(own)] = tuple(tensor.shape)
    found = {tensor.name: tensor.shape for tensor in planned}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        is_vision = name.startswith("vision_tower")
        key, folder = ("--vision-model", vision.folder) if is_vision else ("--language-model", language.folder)
        raise ValueError(
            f"{key}: configuration and weights of {folder} do not belong together in {len(wrong)} tensors. The first: "
            f"{name} is {found.get(name, 'missing')}, config.json asks for {expected.get(name, 'no such tensor')}. "
            "Download it again, whole."
        )
