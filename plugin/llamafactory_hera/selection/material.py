"""What a scoring pass needs of the outside, as plain objects."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .source import Collate, Source
from ..teachers.encoder import VisionTeacher


@dataclass(frozen=True)
class Material:
    """Model, teacher and data of a selection.

    Attributes:
        source: The dataset.
        load_model: Loads the model, frozen, whole on this process.
        collator: From the model to what makes batches of features, with ``labels``.
        load_teacher: Loads the teacher.
        model_name: As the recipe names it.
        model_folder: The local folder of its files.
        adapter_folders: Folders of the adapters that are loaded upon it.
        teacher_name: As the recipe names it.
        dataset_name: As the recipe names it.
        teacher_cache: Folder of the teacher's feature cache, if the run keeps one.
        autocast: The type in which the run computes, where it is not the weights' own.
        num_workers: Processes that decode images.
    """

    source: Source
    load_model: Callable[[], nn.Module]
    collator: Callable[[nn.Module], Collate]
    load_teacher: Callable[[], VisionTeacher]
    model_name: str
    model_folder: Path
    teacher_name: str
    dataset_name: str
    adapter_folders: list[Path] = field(default_factory=list)
    teacher_cache: str | None = None
    autocast: torch.dtype | None = None
    num_workers: int = 0
