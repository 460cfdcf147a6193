"""Environment for everything of Flower's, set before it is imported. Imports nothing, so that every command can begin with it."""

QUIET = {  # no telemetry, no update checks, no installation of packages while a run starts
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
