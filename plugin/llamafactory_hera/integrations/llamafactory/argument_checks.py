"""Whether the values of the ``hera_*`` keys are possible and fit together."""

import warnings
from typing import Any, Literal, get_args

from llamafactory_hera.heads.head_set import HeadSet
from llamafactory_hera.heads.layer_set import LayerSet
from llamafactory_hera.heads.pooling import Pooling
from llamafactory_hera.objectives import find, names
from llamafactory_hera.selection.settings import Mode, StoredDtype, Strategy

from .argument_values import at_least, finite, one_of

Granularity = Literal["head", "layer"]
Similarity = Literal["cosine", "dot"]
Accumulate = Literal["none", "gradcache"]

#: More heads than this wrecked a model in the paper (Qwen2.5-3B with m=10: All 54.2 -> 46.0).
MOST_HEADS = 5
#: Values of ``hera_layers`` that mean a layer of any model.
NAMED_LAYERS = ("middle", "penultimate")
AUTO = "auto"


def check_values(arguments: Any) -> None:
    """Checks the ``hera_*`` values of an arguments object, each by itself and with one another.

    Raises:
        ValueError: Names the key, the value and the remedy.
    """
    one_of("hera_objective", arguments.hera_objective, names())
    one_of("hera_granularity", arguments.hera_granularity, get_args(Granularity))
    if arguments.hera_granularity == "head":
        _check_heads(arguments)
    else:
        _check_layers(arguments)
    _check_objective(arguments)
    if not arguments.hera_teacher:
        raise ValueError(
            "hera_teacher: it has no value; write a folder or a hub id, for instance facebook/dinov2-large."
        )
    at_least("hera_k", arguments.hera_k, 1)
    at_least("hera_memory", arguments.hera_memory, 0)
    at_least("hera_max_nan", arguments.hera_max_nan, 1)
    finite("hera_weight", arguments.hera_weight, arguments.hera_weight >= 0, "0 or more, the paper uses 0.01")
    tau = arguments.hera_temperature
    finite("hera_temperature", tau, tau > 0, "more than 0, the paper uses 0.07")
    one_of("hera_pooling", arguments.hera_pooling, get_args(Pooling))
    one_of("hera_similarity", arguments.hera_similarity, get_args(Similarity))
    one_of("hera_accumulate", arguments.hera_accumulate, get_args(Accumulate))
    _check_selection(arguments)


def _check_heads(arguments: Any) -> None:
    if arguments.hera_layers:
        raise ValueError(
            f"hera_layers: {arguments.hera_layers} is for hera_granularity: layer; set that, or remove hera_layers "
            "(hera_layers=null on a command line)."
        )
    if not arguments.hera_heads:
        raise ValueError(
            "hera_heads: no head is named; write heads such as L13H12,L7H6, give a heads.json, or write auto."
        )
    auto = arguments.hera_heads == AUTO
    chosen = arguments.hera_select_m if auto else len(HeadSet.resolve(arguments.hera_heads).heads)
    if chosen > MOST_HEADS:
        warnings.warn(
            f"{'hera_select_m' if auto else 'hera_heads'}: {chosen} heads are more than the {MOST_HEADS} that the "
            "paper recommends; ten of them wrecked Qwen2.5-3B there.",
            stacklevel=4,
        )


def _check_layers(arguments: Any) -> None:
    if arguments.hera_heads:
        raise ValueError(
            f"hera_heads: {arguments.hera_heads} is for hera_granularity: head; set that, or remove hera_heads "
            "(hera_heads=null on a command line)."
        )
    if not arguments.hera_layers:
        raise ValueError(
            "hera_layers: no layer is named; write layers such as L14,L15, give a layers.json, or write middle, "
            "penultimate or auto."
        )
    if arguments.hera_layers == AUTO and arguments.hera_select == "middle":
        raise ValueError("hera_select: middle chooses among heads; write hera_layers: middle for that layer.")
    if arguments.hera_layers not in (*NAMED_LAYERS, AUTO):
        LayerSet.resolve(arguments.hera_layers)


def _check_objective(arguments: Any) -> None:
    objective, said = find(arguments.hera_objective), f"hera_objective: {arguments.hera_objective}"
    if arguments.hera_granularity not in objective.granularities:
        raise ValueError(
            f"hera_granularity: {arguments.hera_granularity} does not work with {said}; write "
            f"hera_granularity: {' or '.join(objective.granularities)}."
        )
    if arguments.hera_memory > 0 and not objective.uses_candidates:
        raise ValueError(
            f"hera_memory: {arguments.hera_memory} has no use with {said}, which compares no sample with remembered "
            "ones; set it to 0."
        )
    if objective.least_samples == 1 and arguments.hera_accumulate == "gradcache":
        raise ValueError(
            f"hera_accumulate: gradcache has no use with {said}, a mean over samples, none of which is compared with "
            "another; set it to none."
        )
    if objective.view == "patches" and arguments.hera_teacher_cache is not None:
        raise ValueError(
            f"hera_teacher_cache: {arguments.hera_teacher_cache} holds one vector an image, and {said} needs those of "
            "its patches, which are computed in every step; remove it."
        )


def _check_selection(arguments: Any) -> None:
    one_of("hera_select", arguments.hera_select, get_args(Strategy))
    one_of("hera_select_mode", arguments.hera_select_mode, get_args(Mode))
    one_of("hera_select_dtype", arguments.hera_select_dtype, get_args(StoredDtype))
    for key in ("hera_select_m", "hera_select_k", "hera_select_batch_size"):
        at_least(key, getattr(arguments, key), 1)
    at_least("hera_select_samples", arguments.hera_select_samples, arguments.hera_select_k + 2)
    gib = arguments.hera_select_memory_gb
    finite("hera_select_memory_gb", gib, gib > 0, "more than 0, for instance 4")
