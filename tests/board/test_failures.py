"""The reason of a failed run, taken out of what it printed."""

from llamafactory_hera.integrations.llamaboard.failures import with_reason

FAILED = """Failed. Exit code: 1

```
[INFO] loading
ValueError: an earlier one that was handled
Traceback (most recent call last):
  File "cli.py", line 1, in main
    raise ValueError(
{last}
[INFO] the end
```
"""


def test_the_last_error_comes_first() -> None:
    for prefix in ("", "[rank0]: "):
        shown = with_reason(FAILED.format(last=f"{prefix}ValueError: hera_heads: wrong"), "en")
        assert shown.startswith("Failed. Exit code: 1\n\n**ValueError: hera_heads: wrong**\n\n```\n[INFO] loading\n")


def test_other_texts_stay_as_they_are() -> None:
    for text in (
        "Finished.\n\n```\nValueError: no\n```",
        FAILED.split("Value")[0],
        "Aborted, wait",
    ):
        assert with_reason(text, "en") == text


def test_other_languages() -> None:
    text = "训练出错。 Exit code: 1\n\n```\nRuntimeError: 内存\n```\n"
    assert "**RuntimeError: 内存**" in with_reason(text, "zh")
