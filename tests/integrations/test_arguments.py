"""The hera_* keys inside the host's own argument class."""

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest
from llamafactory.hparams import FinetuningArguments
from llamafactory.hparams.parser import _TRAIN_ARGS
from transformers import HfArgumentParser

from llamafactory_hera.integrations.llamafactory.arguments import HeraArguments, extend


def _parse(**values: Any) -> Any:
    (parsed,) = HfArgumentParser([FinetuningArguments]).parse_dict({"stage": "hera", "hera_heads": "L0H1", **values})
    return parsed


def test_stage_hera_is_sft_inside_and_hera_outside() -> None:
    arguments = _parse()
    assert (arguments.stage, arguments.use_hera) == ("sft", True)
    assert arguments.to_dict()["stage"] == "hera"
    assert arguments.to_dict()["hera_heads"] == "L0H1"


def test_other_stages_do_not_see_the_keys() -> None:
    (arguments,) = HfArgumentParser([FinetuningArguments]).parse_dict({"stage": "dpo"})
    assert (arguments.stage, arguments.use_hera) == ("dpo", False)
    assert not [key for key in arguments.to_dict() if key.startswith("hera_")]


def test_the_host_parses_the_extended_class() -> None:
    assert FinetuningArguments in _TRAIN_ARGS
    assert issubclass(FinetuningArguments, HeraArguments)


def test_every_key_has_a_help_and_its_documented_default() -> None:
    fields = {f.name: f for f in dataclasses.fields(HeraArguments)}
    assert all(f.metadata["help"] and f.name.startswith("hera_") for f in fields.values())
    paper = {"hera_weight": 0.01, "hera_k": 10, "hera_temperature": 0.07, "hera_teacher": "facebook/dinov2-large"}
    ours = {"hera_pooling": "answer", "hera_similarity": "cosine", "hera_memory": 0, "hera_fixed_temperature": False}
    assert {name: fields[name].default for name in paper | ours} == paper | ours


def test_no_boolean_defaults_to_true() -> None:
    # the host's web UI drops False from a command line, so such a key could not be switched off there
    assert not [f.name for f in dataclasses.fields(HeraArguments) if f.default is True]


def test_command_line_and_help_know_the_keys() -> None:
    parser = HfArgumentParser([FinetuningArguments])
    (arguments,) = parser.parse_args_into_dataclasses(
        ["--stage", "hera", "--hera_heads", "L0H1,L1H2", "--hera_k", "3"]
    )
    assert (arguments.hera_heads, arguments.hera_k) == ("L0H1,L1H2", 3)
    assert "--hera_pooling {answer,text,mean,last}" in parser.format_help()


def test_a_yaml_list_of_heads_is_accepted() -> None:
    assert _parse(hera_heads=["L0H1", "L1H2"]).hera_heads == "L0H1,L1H2"


@pytest.mark.parametrize("value", [3, [3, 4], 0.5])
def test_a_bare_number_is_no_head_and_no_layer(value: object) -> None:
    with pytest.raises(ValueError, match=r"hera_heads: .* is not a head"):
        _parse(hera_heads=value)
    with pytest.raises(ValueError, match=r"hera_layers: .* is not a layer"):
        _parse(hera_heads=None, hera_granularity="layer", hera_layers=value)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"hera_heads": "auto", "hera_select_m": 10}, "hera_select_m: 10"),
        ({"hera_heads": "L0H0,L0H1,L0H2,L0H3,L0H4,L0H5"}, "hera_heads: 6"),
    ],
)
def test_more_heads_than_the_paper_recommends_are_warned_of(keys: dict, named: str) -> None:
    with pytest.warns(UserWarning, match=f"{named} heads are more than the 5"):
        _parse(**keys)


def test_arguments_travel_to_other_processes() -> None:
    assert FinetuningArguments.__qualname__ == "FinetuningArguments"
    copy = pickle.loads(pickle.dumps(_parse(hera_k=4)))
    assert type(copy) is FinetuningArguments
    assert (copy.hera_k, copy.use_hera) == (4, True)


@pytest.mark.parametrize("value", ["1", "true"])
def test_megatron_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("USE_MCA", value)
    with pytest.raises(ValueError, match="stage: hera does not work with USE_MCA=1"):
        _parse()


def test_extending_twice_is_caught_by_the_patch() -> None:
    import types

    from hera_patches import finetuning_args

    module = types.SimpleNamespace(FinetuningArguments=FinetuningArguments)
    assert "already has hera_heads" in finetuning_args.check(module)


def test_defaults_of_the_host_are_kept() -> None:
    host = FinetuningArguments.__mro__[2]
    assert host.__name__ == "FinetuningArguments"
    theirs = {f.name: f for f in dataclasses.fields(host)}
    ours = {f.name: f for f in dataclasses.fields(extend(host))}
    assert theirs.keys() <= ours.keys()
    assert all(ours[name].default == theirs[name].default for name in theirs)


def test_plugin_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, llamafactory_hera, hera_patches, llamafactory_hera.cli; "
        "print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.parametrize(("value", "meant"), [("false", False), ("True", True), (False, False)])
def test_a_quoted_truth_value_is_what_it_says(value: object, meant: bool) -> None:
    assert _parse(hera_fixed_temperature=value).hera_fixed_temperature is meant


def test_numbers_written_as_text_are_numbers() -> None:
    arguments = _parse(hera_weight="1e-2", hera_k="7", hera_memory=32.0)
    assert (arguments.hera_weight, arguments.hera_k, arguments.hera_memory) == (0.01, 7, 32)
    assert isinstance(arguments.hera_memory, int)


LAYER = {"hera_heads": None, "hera_granularity": "layer", "hera_layers": "L1"}


@pytest.mark.parametrize("layers", ["L1,L2", "middle", "penultimate", "auto", ["L1", "L2"]])
@pytest.mark.parametrize("objective", ["contrastive", "feature", "cka", "viral"])
def test_layers_and_objectives_are_accepted(layers: object, objective: str) -> None:
    arguments = _parse(**LAYER | {"hera_layers": layers, "hera_objective": objective})
    assert arguments.hera_layers == ("L1,L2" if isinstance(layers, list) else layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hera_objective": "cosine"}, "hera_objective: 'cosine' is unknown; choose one of .*viral"),
        ({"hera_granularity": "neuron"}, "hera_granularity: 'neuron' is unknown; choose one of head, layer"),
        ({"hera_layers": "L1"}, "hera_layers: L1 is for hera_granularity: layer; set that, or remove"),
        (LAYER | {"hera_heads": "L0H1"}, "hera_heads: L0H1 is for hera_granularity: head; set that, or remove"),
        (LAYER | {"hera_layers": None}, "hera_layers: no layer is named; write layers such as L14,L15"),
        (
            LAYER | {"hera_layers": "missing/layers.json"},
            "hera_layers: the layers file missing/layers.json cannot be read",
        ),
        (LAYER | {"hera_layers": "last"}, "hera_layers: 'last' is not a layer; write layers as"),
        (LAYER | {"hera_layers": "auto", "hera_select": "middle"}, "hera_select: middle .* write hera_layers: middle"),
        (
            {"hera_objective": "viral"},
            "hera_granularity: head does not work with .* viral; .* hera_granularity: layer",
        ),
        (
            {"hera_objective": "cka", "hera_memory": 4},
            "hera_memory: 4 has no use with .* cka.* set it to 0",
        ),
        (LAYER | {"hera_objective": "feature", "hera_memory": 4}, "hera_memory: 4 has no use with .* feature"),
        (
            {"hera_objective": "feature", "hera_accumulate": "gradcache"},
            "hera_accumulate: gradcache has no use with hera_objective: feature.* set it to none",
        ),
        (
            LAYER | {"hera_objective": "viral", "hera_accumulate": "gradcache"},
            "hera_accumulate: gradcache has no use with hera_objective: viral.* set it to none",
        ),
        (
            LAYER | {"hera_objective": "viral", "hera_teacher_cache": "cache"},
            "hera_teacher_cache: cache holds one vector an image.* remove it",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        _parse(**change)
