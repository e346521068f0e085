"""The ``hera_*`` keys inside the host's fine-tuning arguments; they are declared in ``config.py``."""

import os
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


def _refuse_bypasses(arguments: Any) -> None:
    """Refuses settings under which the host never reaches the trainer that HeRA extends."""
    keys = ("use_hyper_parallel", "use_asft_loss")
    found = [f"{key}: true" for key in keys if getattr(arguments, key, False)]
    if os.environ.get("USE_MCA", "0").lower() in ("true", "y", "1"):
        found.append("USE_MCA=1")
    if found:
        raise ValueError(f"stage: hera does not work with {', '.join(found)}; remove that setting.")


def extend(host: type) -> type:
    """A subclass of the host's ``FinetuningArguments`` with the HeRA keys and ``stage: hera``.

    Inside the host a HeRA run is ``stage: sft`` with ``use_hera`` set; ``to_dict`` reports ``hera`` again.
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
            if self.use_hera:
                _refuse_bypasses(self)
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
