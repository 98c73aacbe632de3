"""A contender of the scale benchmark: one process that does a round whenever it is told to.

    python scale_contenders.py silotune|silotune_ray|pfl|flower FOLDER plain|private

FOLDER is as `scale.py` wrote it: the model, the sites, and all their records as token ids. The other
frameworks train PEFT's LoRA of the same model on the same tokens, and keep model and records in memory
from the first round on, which their tutorials do not: what is compared is the engines.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scale_material import BATCH, CLIP, DELTA, EPSILON, LOCAL_LR, RANK, RECORDS, SERVER_LR, STEPS

NOISE_SEED = 0


def turn() -> None:
    """Say that a round may begin, and wait for the word."""
    print("TURN", flush=True)
    if not sys.stdin.readline():
        os._exit(1)


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "facts.json").read_text()))


# --- silotune ---


def silotune(folder: Path, *, private: bool, engine: str) -> None:
    from scale_material import private as settings

    from silotune.simulation.run import Settings, simulate

    facts = facts_of(folder)

    def listen(event: Any) -> None:
        if event["event"] == "round_started":
            turn()

    simulate(
        folder / "plan.toml",
        runs=folder / f"runs-{engine}-{private}",
        settings=Settings(engine=engine, workers=facts["workers"]),  # type: ignore[arg-type]
        listener=listen,
        overrides=settings() if private else {},
    )


# --- what the other two train ---


def model_of(folder: Path) -> Any:
    """PEFT's LoRA on the same projections, without dropout."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj"],
    )
    return get_peft_model(base, lora)


@functools.cache
def records_of(folder: Path) -> list[tuple[Any, Any, Any]]:
    """Of each site: token ids, attention mask and labels, padded to its longest record."""
    import torch

    stored = np.load(folder / "tokens.npz")
    ids, offsets, prompts = stored["ids"], stored["offsets"], stored["prompts"]
    found = []
    for first in range(0, len(prompts), RECORDS):
        rows = range(first, first + RECORDS)
        longest = max(offsets[row + 1] - offsets[row] for row in rows)
        tokens = np.zeros((RECORDS, longest), np.int64)
        mask, labels = np.zeros_like(tokens), np.full_like(tokens, -100)
        for place, row in enumerate(rows):
            own = ids[offsets[row] : offsets[row + 1]]
            tokens[place, : len(own)], mask[place, : len(own)] = own, 1
            labels[place, prompts[row] : len(own)] = own[prompts[row] :]
        found.append(tuple(map(torch.from_numpy, (tokens, mask, labels))))
    return found


# --- pfl-research ---


def pfl(folder: Path, *, private: bool) -> None:
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.internal.ops.selector import get_framework_module
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    facts = facts_of(folder)
    np.random.seed(0)
    torch.manual_seed(0)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of(folder)

        def loss(self, ids: Any, mask: Any, labels: Any) -> Any:
            self.train()
            return self.inner(input_ids=ids, attention_mask=mask, labels=labels).loss

        def metrics(self, ids: Any, mask: Any, labels: Any) -> dict[str, Any]:
            return {}

    class Turns(TrainingProcessCallback):
        def on_train_begin(self, *, model: Any) -> Any:
            self._ready()
            return Metrics()

        def after_central_iteration(
            self, aggregate_metrics: Any, model: Any, *, central_iteration: int
        ) -> tuple[bool, Any]:
            self._ready()
            return False, Metrics()

        def _ready(self) -> None:
            if get_framework_module().distributed.global_rank == 0:
                turn()

    model = Wrapped()
    users = records_of(folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    sampler = get_user_sampler("minimize_reuse", list(range(len(users))))
    data = FederatedDataset(
        lambda user: PyTorchTensorDataset(users[user], user_id=str(user)), sampler
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=facts["rounds"],
            evaluation_frequency=10**9,
            train_cohort_size=facts["cohort"],
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=data,
            val_data=data,
            postprocessors=[_pfl_mechanism(facts)] if private else [],
        ),
        model=PyTorchModel(
            model=model,
            local_optimizer_create=torch.optim.SGD,
            central_optimizer=torch.optim.Adam(trained, SERVER_LR),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=LOCAL_LR, local_num_epochs=1, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[Turns()],
    )


def _pfl_mechanism(facts: dict[str, Any]) -> Any:
    """Central Gaussian noise on clipped sums, as its benchmarks have it."""
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_accountant import PLDPrivacyAccountant
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

    accountant = PLDPrivacyAccountant(
        num_compositions=facts["rounds"],
        sampling_probability=facts["cohort"] / facts["sites"],
        mechanism="gaussian",
        epsilon=EPSILON,
        delta=DELTA,
    )
    return CentrallyAppliedPrivacyMechanism(
        GaussianMechanism.from_privacy_accountant(accountant=accountant, clipping_bound=CLIP)
    )


# --- Flower ---


@functools.cache
def _client(folder: Path) -> Any:
    return model_of(folder), records_of(folder)


def flower_app() -> Any:
    """A ClientApp whose process keeps the model and the records from one message to the next."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        import torch
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model, users = _client(Path(str(message.content["config"]["folder"])))
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LOCAL_LR)
        model.train()
        ids, mask, labels = users[int(context.node_config["partition-id"])]
        order = torch.randperm(RECORDS)
        for step in range(STEPS):
            rows = order[step * BATCH : (step + 1) * BATCH]
            optimizer.zero_grad()
            model(
                input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows]
            ).loss.backward()
            optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(get_peft_model_state_dict(model)),
                "metrics": MetricRecord({"num-examples": RECORDS}),
            }
        )
        return Message(content, reply_to=message)

    return app


def flower(folder: Path, *, private: bool) -> None:
    from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import (
        DifferentialPrivacyServerSideFixedClipping,
        FedAdam,
    )
    from flwr.simulation import run_simulation
    from peft import get_peft_model_state_dict

    facts, server = facts_of(folder), ServerApp()
    logging.getLogger("flwr").setLevel(logging.ERROR)

    class Counted(FedAdam):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            found = list(replies)
            if sum(reply.has_content() for reply in found) != facts["cohort"]:
                os._exit(1)  # an engine that trains less is no faster
            return super().aggregate_train(server_round, found)

    @server.main()
    def main(grid: Any, context: Any) -> None:
        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            turn()
            return MetricRecord({"round": server_round})

        strategy: Any = Counted(
            fraction_train=facts["cohort"] / facts["sites"],
            fraction_evaluate=0.0,
            min_available_nodes=facts["sites"],
            eta=SERVER_LR,
        )
        if private:
            strategy = DifferentialPrivacyServerSideFixedClipping(
                strategy,
                noise_multiplier=1.0,
                clipping_norm=CLIP,
                num_sampled_clients=facts["cohort"],
            )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(get_peft_model_state_dict(model_of(folder))),
            num_rounds=facts["rounds"],
            train_config=ConfigRecord({"folder": str(folder)}),
            evaluate_fn=evaluate,
        )

    run_simulation(
        server,
        flower_app(),
        num_supernodes=facts["sites"],
        backend_config={
            "init_args": {"num_cpus": facts["workers"], "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )


def main() -> None:
    name, folder, private = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "private"
    if name == "pfl":
        pfl(folder, private=private)
    elif name == "flower":
        flower(folder, private=private)
    else:
        engine = "ray" if name == "silotune_ray" else "processes"
        silotune(folder, private=private, engine=engine)


if __name__ == "__main__":
    import scale_contenders  # Ray's actors find what a module has, and not what a script has

    scale_contenders.main()
