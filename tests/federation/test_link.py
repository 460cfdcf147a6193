"""The SuperLink's patience with its database."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from sqlalchemy import text
from flwr.supercore.sql_mixin import SqlMixin
from server.link import be_patient
if sys.argv[2] == "patient":
    be_patient()
class Database(SqlMixin):
    def get_metadata(self):
        return None
database = Database(sys.argv[1])
database.initialize()
print(database.query("PRAGMA busy_timeout"))
"""


def asked(path: Path, how: str) -> str:
    """How long a connection of Flower's waits for a lock, by SQLite itself; in a process of its own."""
    done = subprocess.run([sys.executable, "-c", CODE, str(path), how], capture_output=True, text=True, check=True)
    return done.stdout


def test_every_connection_of_flower_s_waits_a_minute(tmp_path: Path) -> None:
    assert "60000" in asked(tmp_path / "a.db", "patient")
    assert "5000" in asked(tmp_path / "b.db", "as it is")
