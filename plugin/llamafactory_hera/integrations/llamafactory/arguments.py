"""The ``hera_*`` keys in the host's fine-tuning arguments."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_args

from llamafactory_hera.config import HeraConfig

#: The keys of ``config.py`` as fields of a dataclass that the host's parser reads.
HeraArguments = make_dataclass(
    "HeraArguments",
    [
        # The parser allows no union of types but with None. `HeraConfig` converts the text.
        (
            key,
            declared.type if declared.type != int | Literal["auto"] else str,
            field(default=declared.default, metadata={"help": declared.metadata["help"]}),
        )
        for key, declared in HeraConfig.knobs().items()
    ],
    namespace={"__doc__": "Keys of ``stage: hera``.", "__module__": __name__},
)


def extend(host: type, require: Callable[[], None] = lambda: None) -> type:
    """Creates a subclass of the host's ``FinetuningArguments`` with the ``hera_*`` keys and ``stage: hera``.

    Inside the host a HeRA run has ``stage: sft`` and ``use_hera``; ``to_dict`` reports ``stage: hera``. ``require``
    raises an error if a HeRA run cannot start.
    """
    host_stage = host.__dataclass_fields__["stage"]  # type: ignore[attr-defined]
    stages = Literal[(*get_args(host_stage.type), "hera")]  # type: ignore[valid-type]

    @dataclass
    class FinetuningArguments(HeraArguments, host):  # type: ignore[misc, valid-type]
        stage: stages = field(  # type: ignore[valid-type]
            default=host_stage.default, metadata=dict(host_stage.metadata)
        )

        def __post_init__(self) -> None:
            self.use_hera = self.stage == "hera"
            if self.use_hera:
                self.stage = "sft"
            super().__post_init__()
            if self.use_hera:
                require()
                # The host shows and stores these values, so they are converted to their types here.
                for key, value in HeraConfig.from_keys(self).keys().items():
                    setattr(self, key, value)
            elif unread := [key for key, d in HeraConfig.knobs().items() if getattr(self, key) != d.default]:
                text = f"stage: {self.stage} trains without HeRA and ignores {', '.join(unread)}; write stage: hera."
                warnings.warn(text, stacklevel=2)

        def to_dict(self) -> dict[str, Any]:
            content = super().to_dict()
            if self.use_hera:
                return {**content, "stage": "hera"}
            return {key: value for key, value in content.items() if not key.startswith(HeraConfig.PREFIX)}

    # pickle looks the class up under the name of the host's class.
    FinetuningArguments.__module__, FinetuningArguments.__qualname__ = host.__module__, host.__qualname__
    FinetuningArguments.__doc__ = host.__doc__
    return FinetuningArguments
