"""The ``hera_*`` keys inside the host's fine-tuning arguments; they are declared in ``config.py``."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_args

from llamafactory_hera.config import HeraConfig

#: The keys as fields of a dataclass, as the host's parser reads them.
HeraArguments = make_dataclass(
    "HeraArguments",
    [
        (key, declared.type, field(default=declared.default, metadata={"help": declared.metadata["help"]}))
        for key, declared in HeraConfig.knobs().items()
    ],
    namespace={"__doc__": "Keys of ``stage: hera``.", "__module__": __name__},
)


def extend(host: type, require: Callable[[], None] = lambda: None) -> type:
    """A subclass of the host's ``FinetuningArguments`` with the HeRA keys and ``stage: hera``.

    Inside the host a HeRA run is ``stage: sft`` with ``use_hera`` set; ``to_dict`` reports ``hera`` again. ``require``
    raises where such a run must not start.
    """
    host_stage = host.__dataclass_fields__["stage"]  # type: ignore[attr-defined]

    @dataclass
    class FinetuningArguments(HeraArguments, host):  # type: ignore[misc, valid-type]
        stage: Literal[(*get_args(host_stage.type), "hera")] = field(  # type: ignore[valid-type]
            default=host_stage.default, metadata=dict(host_stage.metadata)
        )

        def __post_init__(self) -> None:
            self.use_hera = self.stage == "hera"
            if self.use_hera:
                self.stage = "sft"
            super().__post_init__()
            unread = [key for key, d in HeraConfig.knobs().items() if getattr(self, key) != d.default]
            if unread and not self.use_hera:
                warnings.warn(
                    f"stage: {self.stage} does not read {', '.join(unread)}; write stage: hera.", stacklevel=2
                )
            if self.use_hera:
                require()
                # read once here, so that every value has its type wherever the host shows it
                for key, value in HeraConfig.from_keys(self).keys().items():
                    setattr(self, key, value)

        def to_dict(self) -> dict[str, Any]:
            content = super().to_dict()
            if self.use_hera:
                return {**content, "stage": "hera"}
            return {key: value for key, value in content.items() if not key.startswith(HeraConfig.PREFIX)}

    # pickle finds the class where the host has it
    FinetuningArguments.__module__ = host.__module__
    FinetuningArguments.__qualname__ = host.__qualname__
    FinetuningArguments.__doc__ = host.__doc__
    return FinetuningArguments
