"""Fixtures shared with the teachers' tests."""

from tests.teachers.conftest import edit_json, fsdp, zero3  # noqa: F401
