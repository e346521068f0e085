"""A fixture shared with the tests of the teachers."""

from tests.teachers.conftest import edit_json  # noqa: F401
