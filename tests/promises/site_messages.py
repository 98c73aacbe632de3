"""Messages to one site, through its ClientApp and without a grid."""

from flwr.app import ConfigRecord, Context, Message, RecordDict

from silotune.client.app import build_client_app
from silotune.protocol.requests import as_arrays


def ask(run, kind, number=None, adapter=None, **settings):
    """Send one message through the ClientApp, as a grid would."""
    app = build_client_app(lambda context, plan, name: run)
    config = {"plan": run.plan.canonical(), "run": run.run, **settings}
    if number is not None:
        config["round"] = number
    content = RecordDict({"config": ConfigRecord(config)})
    if adapter is not None:
        content["arrays"] = as_arrays(adapter)
    message = Message(content, dst_node_id=1, message_type=kind)
    message.metadata.__dict__["_message_id"] = f"{kind}-{number}"
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    return app(message=message, context=context).content
