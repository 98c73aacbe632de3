"""Programs that the workers of these tests load; what a site does is in the message's config."""

import os
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from silotune.errors import BudgetExceeded, ModelNotFound


class OddCode(Exception):
    code = "ST-401 patient 4711"


class Program:
    def __init__(self, payload):
        self.payload = payload
        self.client_app = ClientApp()
        self.client_app.train()(train)
        self.client_app.train("step")(train)
        self.client_app.query("who")(who)

    def inspect(self, site_index, request, arrays):
        if request.get("fail") == site_index:
            raise BudgetExceeded("patient 4711")
        if request.get("die") == site_index:
            os._exit(9)
        arrays["x"][:1] = -1  # a site may scribble on what it got; no other must see it
        answer = {"site": site_index, "pid": os.getpid(), **self.payload}
        return answer, {"x": arrays["x"] + np.float32(site_index)}


def train(message: Message, context) -> Message:
    config = message.content["config"]
    misbehave(str(config.get("do", "")), message)
    seen = int(context.state["seen"]["count"]) + 1 if "seen" in context.state else 1
    context.state["seen"] = MetricRecord({"count": seen})
    flat = message.content["arrays"]["flat"].numpy()
    time.sleep(float(config.get(f"sleep-{context.node_id}", 0.0)))
    update = Array(flat * np.float32(context.node_id))
    released = MetricRecord({"seen": seen, "pid": os.getpid()})
    content = RecordDict({"update": ArrayRecord({"flat": update}), "released": released})
    return Message(content, reply_to=message)


def misbehave(how, message):
    if how == "coded":
        raise BudgetExceeded("patient 4711")
    if how == "text":
        raise ValueError("patient 4711")
    if how == "odd code":
        raise OddCode("patient 4711")
    if how == "exit":
        sys.exit("patient 4711")
    if how == "die":
        os._exit(3)
    if how == "print":
        print("noise " * 1000, flush=True)


def who(message: Message, context) -> Message:
    config = ConfigRecord(
        {
            "run": context.run_id,
            "node": context.node_id,
            **context.node_config,
        }
    )
    return Message(RecordDict({"who": config}), reply_to=message)


def build(payload):
    return Program(payload)


def build_wrong_replies(payload):
    program = Program(payload)
    program.client_app = ClientApp()

    @program.client_app.train()
    def nonsense(message, context):
        return {"not": "a message"}

    @program.client_app.train("step")
    def to_nobody(message, context):
        message.metadata.__dict__["_message_id"] = "another message"
        return Message(RecordDict(), reply_to=message)

    return program


def build_without_model(payload):
    raise ModelNotFound("no folder 'minilm' here")


def build_with_a_bug(payload):
    raise ZeroDivisionError("patient 4711")


def build_and_die(payload):
    os._exit(7)


def build_torch(payload):
    import torch

    program = Program(payload)
    program.client_app = ClientApp()

    @program.client_app.train()
    def multiply(message, context):
        rows = torch.from_numpy(message.content["arrays"]["flat"].numpy()).reshape(500, 500)
        product = (rows @ rows.T).sum(0) * context.node_id
        released = MetricRecord({"threads": torch.get_num_threads()})
        update = ArrayRecord({"flat": Array(product.numpy())})
        content = RecordDict({"update": update, "released": released})
        return Message(content, reply_to=message)

    return program
