"""Registers HeRA's trainer as one of ms-swift's ``external_plugins``."""

import llamafactory_hera.integrations.ms_swift  # noqa: F401
