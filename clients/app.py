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


@app.query("sketch")
def sketch(message: Message, context: Context) -> Message:
    """The first gradient's sketch, where the basis is made of those."""
    return _answered(message, context)


@app.query("prepare")
def prepare(message: Message, context: Context) -> Message:
    """Load the model and get hold of the basis."""
    return _answered(message, context)


@app.query("advertise")
def advertise(message: Message, context: Context) -> Message:
    """Secure sum: new public keys for a round."""
    return _answered(message, context)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Secure sum: shares of the secrets behind them, encrypted for the others."""
    return _answered(message, context)


@app.query("reveal")
def reveal(message: Message, context: Context) -> Message:
    """Secure sum: the shares that take the masks off the sum."""
    return _answered(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round: the global core in, the locally trained core out."""
    return _answered(message, context)


@app.train("personalise")
def personalise(message: Message, context: Context) -> Message:
    """Go on from the global core on the own data alone."""
    return _answered(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score base, global or personal core on the own test set."""
    return _answered(message, context)


def _answered(message: Message, context: Context) -> Message:
    kind, socket = message.metadata.message_type, os.environ.get(SOCKET)
    if socket:
        seconds = message.metadata.ttl  # after which the server waits no more
        return Message(ask(Path(socket), kind, message.content, seconds), reply_to=message)
    from clients.answers import answer  # here, since it imports torch

    return Message(answer(kind, message.content, context.node_config), reply_to=message)
