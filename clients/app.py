"""The Flower ClientApp: hands every question to `clients/answers.py`.

Flower starts a new process for each message, and loading torch and a model takes longer than a round. So a real site runs
a trainer that keeps them (`clients/worker.py`): if FEDSB_TRAINER names its socket, this process passes the question on and
imports no torch. Without it, as in a simulation, the question is answered here.
"""

import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.ask import SOCKET, ask

app = ClientApp()


def _answered(message: Message, context: Context) -> Message:
    kind, socket = message.metadata.message_type, os.environ.get(SOCKET)
    if socket:
        seconds = message.metadata.ttl  # after which the server waits no more
        return Message(ask(Path(socket), kind, message.content, seconds), reply_to=message)
    from clients.answers import answer  # here, since it imports torch

    return Message(answer(kind, message.content, context.node_config), reply_to=message)


for action in ("sketch", "prepare", "advertise", "share", "reveal"):
    app.query(action)(_answered)
app.train()(_answered)
app.train("personalise")(_answered)
app.evaluate()(_answered)
