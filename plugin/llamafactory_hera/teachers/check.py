"""Says before any weight is loaded whether a config value names a usable teacher."""

from dataclasses import dataclass
from pathlib import Path

from .families import FAMILIES, TeacherFamily
from .files import CONFIG_FILE, PROCESSOR_FILES, processor_config, read_json, weight_files
from .hub import teacher_folder


@dataclass(frozen=True)
class TeacherInfo:
    """What a teacher's config files say.

    Attributes:
        model_type: The ``model_type`` of its ``config.json``.
        hidden_size: Length D of a feature.
        has_cls: The feature is the output CLS token; otherwise the mean of the patch tokens.
        path: The local folder with the config files (of a hub model: its snapshot in the hub cache).
        name: The value as it was given.
    """

    model_type: str
    hidden_size: int
    has_cls: bool
    path: Path
    name: str

    @property
    def family(self) -> TeacherFamily:
        """How this kind of model is loaded and read."""
        return FAMILIES[self.model_type]


def check_teacher(name_or_path: str, key: str = "hera_teacher") -> TeacherInfo:
    """Checks that a folder or hub id holds a vision model, its image processor and whole weight files.

    Only config files are read, and of weight files the headers. Of a hub model only the config files are fetched.

    Raises:
        ValueError: Names ``key``, the value and the remedy: no such folder or hub model, hub out of reach, not a
            vision model, no image processor, no weights or weights that are not whole.
    """
    value = str(name_or_path)
    folder = teacher_folder(value, key, weights=False)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{key}: the folder {value} holds no {CONFIG_FILE}. Give the folder that `save_pretrained` or "
            "`hf download` filled for a vision model such as facebook/dinov2-large."
        )
    model_type = _model_type(folder, key, value)
    if processor_config(folder) is None:
        raise ValueError(
            f"{key}: {value} holds no image processor ({' or '.join(PROCESSOR_FILES)}). Put the one of the same "
            "model there: the teacher must see images as it did in its training."
        )
    # Of a hub model the weights are not here yet; teacher_folder asked the hub whether it has them.
    if Path(value).expanduser().is_dir():
        try:
            weight_files(folder)
        except ValueError as error:
            raise ValueError(f"{key}: {error}. Copy or download the teacher {value} again, whole.") from error
    return TeacherInfo(model_type, _hidden_size(folder, model_type, key), FAMILIES[model_type].has_cls, folder, value)


def _model_type(folder: Path, key: str, value: str) -> str:
    model_type = read_json(folder / CONFIG_FILE).get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"{key}: {value} is not a vision model that can be the teacher (its model_type is {model_type!r}). Give "
            f"one of these: {', '.join(sorted(FAMILIES))}; the paper's is facebook/dinov2-large."
        )
    return model_type


def _hidden_size(folder: Path, model_type: str, key: str) -> int:
    # Hub configs leave out what equals the default, so the config class has to fill it in.
    import transformers

    model_class = getattr(transformers, FAMILIES[model_type].model_class, None)
    if model_class is None:
        raise ValueError(
            f"{key}: transformers {transformers.__version__} does not know {model_type} models. Use a newer "
            "transformers or another teacher."
        )
    return int(model_class.config_class.from_pretrained(folder).hidden_size)
