"""The keys of a selection: what they default to, and what is refused."""

from dataclasses import asdict

import pytest

from llamafactory_hera.integrations.llamafactory.arguments import HeraArguments
from llamafactory_hera.selection.settings import SelectSettings


def test_the_keys_default_to_the_settings():
    assert asdict(SelectSettings.from_arguments(HeraArguments())) == asdict(SelectSettings())


def test_every_key_reaches_the_settings():
    values = {"mode": "mllm", "samples": 77, "k": 3, "m": 2, "batch_size": 4, "seed": 9, "memory_gb": 1.5}
    keys = {f"hera_select_{name}": value for name, value in values.items()}
    arguments = HeraArguments(
        **keys, hera_select="top", hera_select_dtype="fp16", hera_pooling="text", hera_similarity="dot"
    )
    expected = values | {"strategy": "top", "stored_dtype": "fp16", "pooling": "text", "similarity": "dot"}
    assert SelectSettings.from_arguments(arguments) == SelectSettings(**expected)
    assert SelectSettings(memory_gb=1.5).memory_bytes == 3 * 2**29


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hera_select", "best", "'best' is unknown; choose one of worst, top, random, middle"),
        ("hera_select_mode", "vlm", "'vlm' is unknown; choose one of llm, mllm"),
        ("hera_select_dtype", "bf16", "'bf16' is unknown; choose one of fp32, fp16"),
        ("hera_select_m", 0, "0 is too small; choose 1 or more"),
        ("hera_select_k", 0, "0 is too small; choose 1 or more"),
        ("hera_select_batch_size", 0, "0 is too small; choose 1 or more"),
        ("hera_select_samples", 11, "11 is too small; choose 12 or more"),
        ("hera_select_memory_gb", 0.0, "0.0 is out of range; choose more than 0"),
        ("hera_select_memory_gb", float("nan"), "nan is out of range"),
    ],
)
def test_a_bad_value_names_key_value_and_remedy(key, value, said):
    with pytest.raises(ValueError) as error:
        HeraArguments(hera_heads="auto", **{key: value}).check_hera()
    assert str(error.value).startswith(f"{key}: ")
    assert said in str(error.value)
