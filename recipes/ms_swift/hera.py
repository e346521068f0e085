"""The plugin for ms-swift's ``external_plugins``: it registers HeRA's trainer."""

import llamafactory_hera.integrations.ms_swift  # noqa: F401
