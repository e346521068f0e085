"""Imports a fixture of the tests of the teachers."""

from tests.teachers.conftest import edit_json  # noqa: F401
