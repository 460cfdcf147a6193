"""A ClientApp that sends back what it gets."""

from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def echo(message: Message, context: Any) -> Message:
    """The arrays as they came, in a record of their own."""
    arrays = message.content["arrays"].copy() if "arrays" in message.content else None
    return Message(RecordDict({"arrays": arrays} if arrays is not None else {}), reply_to=message)
