"""Flower's SuperLink, more patient with its database: `python -m server.link`, flags as `flower-superlink`.

SQLite has one writer. Flower 1.41 lets a request wait 5 s for its turn and then answers 500, which neither a SuperNode nor the
ServerApp's executor asks again: on a busy disk one large reply ends a run. Here a request waits longer instead.
"""

from flwr.supercore import sql_mixin
from flwr.supercore.constant import SQLITE_PRAGMAS
from flwr.superlink.cli import flower_superlink

BUSY_SECONDS = 60


def be_patient() -> None:
    """Let every connection that this process makes from now on wait `BUSY_SECONDS` for the database."""
    settings = dict(SQLITE_PRAGMAS) | {"busy_timeout": str(1000 * BUSY_SECONDS)}
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple(settings.items())  # Flower has no setting for it


if __name__ == "__main__":
    be_patient()
    flower_superlink()
