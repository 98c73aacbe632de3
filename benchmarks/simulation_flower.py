"""The peer of the simulation benchmark: LoRA over Flower as its tutorials write it.

A ClientApp that loads the model and the site's data for each message it gets, FedAvg, and Flower's
Ray engine. The settings come with the message, for Flower's `run_simulation` has no run config.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import transformers
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

client_app = ClientApp()


def load_model(base: str, r: int, layers: list[int]) -> PeftModel:
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=r,
        lora_alpha=2 * r,
        target_modules=["query", "value"],
        layers_to_transform=layers,
    )
    return get_peft_model(model, lora)


def load_data(base: str, folder: str, batch: int, max_length: int) -> DataLoader:
    tokenizer = AutoTokenizer.from_pretrained(base)
    table = pd.read_csv(Path(folder) / "records.csv")
    encoded = tokenizer(table["description"].tolist(), truncation=True, max_length=max_length)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": int(label == "chronic")}
        for ids, mask, label in zip(
            encoded["input_ids"], encoded["attention_mask"], table["course"], strict=True
        )
    ]
    collate = transformers.DataCollatorWithPadding(tokenizer)
    return DataLoader(rows, batch_size=batch, shuffle=True, collate_fn=collate)


@client_app.train()
def train(message: Message, context) -> Message:
    config = message.content["config"]
    site = config["folders"][int(context.node_config["partition-id"])]
    model = load_model(config["base"], config["r"], config["layers"])
    loader = load_data(config["base"], site, config["batch"], config["max-length"])
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for batch in itertools.islice(itertools.cycle(loader), config["steps"]):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": len(loader.dataset), "loss": float(loss)}),
        }
    )
    return Message(content, reply_to=message)


@client_app.train("nothing")
def nothing(message: Message, context) -> Message:
    """Take an adapter and send an update of the same size."""
    update = message.content["arrays"].to_numpy_ndarrays()
    return Message(RecordDict({"arrays": ArrayRecord(update)}), reply_to=message)


@client_app.query("partition")
def partition(message: Message, context) -> Message:
    number = ConfigRecord({"number": context.node_config["partition-id"]})
    return Message(RecordDict({"partition": number}), reply_to=message)


class FedAvgOfSome(FedAvg):
    """FedAvg that trains at given nodes, so that sites and data are those of the other contender.

    Parameters
    ----------
    nodes : list of int
        Whom to ask in each round.
    config : ConfigRecord
        What to tell them.
    """

    def __init__(self, nodes: list[int], config: ConfigRecord) -> None:
        super().__init__(fraction_evaluate=0.0)
        self.nodes, self.config = nodes, config

    def configure_train(self, server_round, arrays, config, grid):
        content = RecordDict({"arrays": arrays, "config": self.config})
        return [Message(content, node, "train", group_id=str(server_round)) for node in self.nodes]


def start_fedavg(
    grid, *, nodes: list[int], config: ConfigRecord, rounds: int, hook: Callable[[int], None]
) -> None:
    """Train; `hook` is called with 0 before the first round, and with each round's number after it."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        hook(server_round)
        return MetricRecord({"round": server_round})

    initial = ArrayRecord(
        get_peft_model_state_dict(load_model(config["base"], config["r"], config["layers"]))
    )
    strategy = FedAvgOfSome(nodes, config)
    result = strategy.start(
        grid=grid, initial_arrays=initial, num_rounds=rounds, evaluate_fn=evaluate
    )
    if not all(len(result.train_metrics_clientapp[n]) for n in range(1, rounds + 1)):
        raise RuntimeError("a round of the peer failed")
