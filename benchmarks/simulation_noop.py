"""A program that trains nothing: what is left of a simulation is what messages cost."""

from __future__ import annotations

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp


class Nothing:
    """Takes an adapter and sends an update of the same size."""

    def __init__(self) -> None:
        self.client_app = ClientApp()

        @self.client_app.train("nothing")
        def nothing(message: Message, context) -> Message:
            update = message.content["arrays"].to_numpy_ndarrays()
            return Message(RecordDict({"arrays": ArrayRecord(update)}), reply_to=message)

    def inspect(self, site_index, request, arrays):
        raise NotImplementedError


def build(payload) -> Nothing:
    return Nothing()
