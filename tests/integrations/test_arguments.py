"""The hera_* keys in the host's argument class; tests/test_config.py tests their meaning."""

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest
from llamafactory.hparams import FinetuningArguments
from llamafactory.hparams.parser import _TRAIN_ARGS
from transformers import HfArgumentParser

from llamafactory_harc.config import HarcConfig
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.integrations.llamafactory.arguments import extend


def _parse(**values: Any) -> Any:
    (parsed,) = HfArgumentParser([FinetuningArguments]).parse_dict({"stage": "hera", "hera_heads": "L0H1", **values})
    return parsed


def test_stage_hera_runs_as_sft_and_is_saved_as_hera():
    arguments = _parse()
    assert (arguments.stage, arguments.own_stage) == ("sft", "hera")
    assert arguments.to_dict()["stage"] == "hera"
    assert arguments.to_dict()["hera_heads"] == "L0H1"


def test_other_stages_drop_the_keys_with_a_warning():
    with pytest.warns(match="stage: dpo ignores hera_heads, hera_k; write stage: hera"):
        (arguments,) = HfArgumentParser([FinetuningArguments]).parse_dict(
            {"stage": "dpo", "hera_k": 0, "hera_heads": "L0H1"}
        )
    assert (arguments.stage, arguments.own_stage) == ("dpo", None)
    assert not [key for key in arguments.to_dict() if key.startswith("hera_")]


def test_the_host_parses_a_subclass_with_every_key_and_the_hosts_defaults():
    assert FinetuningArguments in _TRAIN_ARGS
    _, *stages, host, _ = FinetuningArguments.__mro__[:5]
    for stage, config in zip(stages, (HeraConfig, HarcConfig), strict=False):
        found = {f.name: f for f in dataclasses.fields(stage)}
        assert found.keys() == config.knobs().keys()
        assert all(f.metadata["help"] for f in found.values())
    assert host.__name__ == "FinetuningArguments"
    original = {f.name: f for f in dataclasses.fields(host)}
    extended = {f.name: f for f in dataclasses.fields(extend(host))}
    assert original.keys() <= extended.keys()
    assert all(extended[name].default == original[name].default for name in original)


def test_values_have_their_types_and_are_checked():
    arguments = _parse(hera_weight="1e-2", hera_memory=32.0, hera_heads=["L0H1", "L1H2"])
    assert (arguments.hera_weight, arguments.hera_memory, arguments.hera_heads) == (0.01, 32, "L0H1,L1H2")
    with pytest.raises(ValueError, match=r"^hera_layers: L1 "):
        _parse(hera_layers="L1")


def test_arguments_can_be_pickled_for_other_processes():
    assert FinetuningArguments.__qualname__ == "FinetuningArguments"
    copy = pickle.loads(pickle.dumps(_parse(hera_k=4)))
    assert type(copy) is FinetuningArguments
    assert (copy.hera_k, copy.own_stage) == (4, "hera")


def test_plugin_import_loads_nothing_heavy():
    code = (
        "import sys, llamafactory_hera, hera_patches, llamafactory_hera.cli; "
        "print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
