"""The keys of the plugin's stages in the host's fine-tuning arguments."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from pkgutil import resolve_name
from typing import Any, Literal, get_args

from llamafactory_hera.keys import KeyedConfig

from . import STAGES

_CONFIGS: dict[str, type[KeyedConfig]] = {name: resolve_name(stage.config) for name, stage in STAGES.items()}


def _arguments(stage: str) -> type:
    """Creates a dataclass with the keys of a stage for the host's parser."""
    fields = [
        # The parser allows unions only with None. The settings class converts the text.
        (
            key,
            declared.type if declared.type != int | Literal["auto"] else str,
            field(default=declared.default, metadata={"help": declared.metadata["help"]}),
        )
        for key, declared in _CONFIGS[stage].knobs().items()
    ]
    return make_dataclass(f"Arguments_{stage}", fields, namespace={"__module__": __name__})


def check_names(names: Any) -> None:
    """Raises ``ValueError`` for a name that has a stage's prefix but is not one of its keys, and suggests a key."""
    for config in _CONFIGS.values():
        config.check_names(names)


def extend(host: type, require: Callable[[], None] = lambda: None) -> type:
    """Creates a subclass of the host's ``FinetuningArguments`` with the stages of the plugin and their keys.

    Inside the host, a run of such a stage has ``stage: sft`` and ``own_stage``; ``to_dict`` reports ``own_stage``.
    ``require`` raises an error if such a run cannot start.
    """
    host_stage = host.__dataclass_fields__["stage"]  # type: ignore[attr-defined]
    stages = Literal[(*get_args(host_stage.type), *STAGES)]  # type: ignore[valid-type]

    @dataclass
    class FinetuningArguments(*map(_arguments, STAGES), host):  # type: ignore[misc]
        stage: stages = field(  # type: ignore[valid-type]
            default=host_stage.default, metadata=dict(host_stage.metadata)
        )

        def __post_init__(self) -> None:
            self.own_stage = self.stage if self.stage in STAGES else None
            if self.own_stage is not None:
                self.stage = "sft"
            super().__post_init__()
            if self.own_stage is not None:
                require()
                # The host shows and stores these values, so they are converted to their types here.
                for key, value in _CONFIGS[self.own_stage].from_keys(self).keys().items():
                    setattr(self, key, value)
            for name, config in _CONFIGS.items():
                unread = [key for key, d in config.knobs().items() if getattr(self, key) != d.default]
                if unread and name != self.own_stage:
                    stage = self.own_stage or self.stage
                    text = f"stage: {stage} ignores {', '.join(unread)}; write stage: {name}."
                    warnings.warn(text, stacklevel=2)

        def to_dict(self) -> dict[str, Any]:
            content = super().to_dict()
            others = tuple(config.PREFIX for name, config in _CONFIGS.items() if name != self.own_stage)
            content = {key: value for key, value in content.items() if not key.startswith(others)}
            return {**content, "stage": self.own_stage} if self.own_stage is not None else content

    # pickle looks up the class under the name of the host's class.
    FinetuningArguments.__module__, FinetuningArguments.__qualname__ = host.__module__, host.__qualname__
    FinetuningArguments.__doc__ = host.__doc__
    return FinetuningArguments
