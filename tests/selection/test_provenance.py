"""The keys of a selection: what is refused, and which of them decide whether two selections are the same."""

import pytest

from llamafactory_hera.config import HeraConfig
from llamafactory_hera.knobs import Role
from llamafactory_hera.selection.provenance import compared_facts, differences

from .tiny import settings

NOW = {"model": "m", "teacher": "t", "dataset": "d", "model_fingerprint": "a" * 64, "teacher_fingerprint": "b" * 64}


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("hera_select", "best", "'best' is unknown; choose one of worst, top, random, middle"),
        ("hera_select_mode", "vlm", "'vlm' is unknown; choose one of llm, mllm"),
        ("hera_select_dtype", "bf16", "'bf16' is unknown; choose one of fp32, fp16"),
        ("hera_select_m", 0, "0 is out of range; choose 1 or more"),
        ("hera_select_k", 0, "0 is out of range; choose 1 or more"),
        ("hera_select_batch_size", 0, "0 is out of range; choose 1 or more"),
        ("hera_select_samples", 11, "11 is out of range; choose 12 or more"),
        ("hera_select_memory_gb", 0.0, "0.0 is out of range; choose more than 0"),
        ("hera_select_memory_gb", float("nan"), "nan is out of range"),
    ],
)
def test_a_bad_value_names_key_value_and_remedy(key, value, problem):
    with pytest.raises(ValueError) as error:
        HeraConfig.from_keys({"hera_heads": "auto", key: value})
    assert str(error.value).startswith(f"{key}: ")
    assert problem in str(error.value)


def facts(**keys):
    config = settings(**keys)
    return config.facts(Role.SELECTS, Role.SCORES, Role.TRAINS) | NOW


@pytest.mark.parametrize(
    ("key", "value", "roles", "shown"),
    [
        ("select_m", 2, {Role.SELECTS, Role.TRAINS}, "hera_select_m was 3, is 2"),
        ("select", "top", {Role.SELECTS}, "hera_select was worst, is top"),
        ("select_samples", 9, {Role.SELECTS}, "hera_select_samples was 40, is 9"),
        ("select_seed", 9, {Role.SELECTS}, "hera_select_seed was 0, is 9"),
        ("select_mode", "mllm", {Role.SELECTS, Role.SCORES}, "hera_select_mode was llm, is mllm"),
        ("select_k", 5, {Role.SELECTS, Role.SCORES}, "hera_select_k was 4, is 5"),
        ("pooling", "last", {Role.SELECTS, Role.SCORES}, "hera_pooling was answer, is last"),
        ("similarity", "dot", {Role.SELECTS, Role.SCORES}, "hera_similarity was cosine, is dot"),
        ("select_batch_size", 2, set(), ""),
        ("select_dtype", "fp16", set(), ""),
        ("select_memory_gb", 1, set(), ""),
        ("k", 3, set(), ""),
    ],
)
def test_what_each_key_decides(key, value, roles, shown):
    for role in (Role.SELECTS, Role.TRAINS, Role.SCORES):
        digest = {"samples_digest": "c"}
        found = differences(facts() | digest, facts(**{key: value}) | digest, role)
        assert found == ([shown] if role in roles else [])


def test_what_is_measured_is_compared_and_named_with_what_decides_it():
    other = NOW | {"model": "n", "model_fingerprint": "c" * 64, "dataset": "e"}
    named = "model_name_or_path was m (fingerprint aaaaaaaa), is n (fingerprint cccccccc)"
    assert differences(facts(), facts() | other, Role.SELECTS) == [named, "dataset was d, is e"]
    assert differences(facts(), facts() | other, Role.TRAINS) == [named]
    teacher = {"teacher": "u", "teacher_fingerprint": "c" * 64}
    named = "hera_teacher was t (fingerprint bbbbbbbb), is u (fingerprint cccccccc)"
    for role in (Role.SELECTS, Role.TRAINS):
        assert differences(facts(), facts() | teacher, role) == [named]
    assert {"samples_digest", "teacher_fingerprint"} <= compared_facts(Role.SCORES).keys()


def test_a_fact_that_an_older_file_lacks_is_not_compared():
    older = {fact: value for fact, value in facts().items() if fact != "similarity"}
    assert differences(older, facts(similarity="dot"), Role.SELECTS) == []
