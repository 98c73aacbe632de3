"""Writes run directories that look like real ones, with numbers known beforehand.

``python tests/simulation/synthetic_run.py FOLDER [VARIANT]`` writes one and its report, to look at.
"""

import math
import sys
from pathlib import Path

import numpy as np

from silotune.plan.plan import Plan
from silotune.rounds.run_directory import RunDirectory

HOSPITALS = {
    "Eye & ENT": 1893,
    "Orthopaedics": 3864,
    "Neuro & mental": 1338,
    "Cardiac & respiratory": 1672,
    "GI, renal & skin": 2204,
    "Oncology, haematology & endocrine": 2471,
    "Infection, women & children": 2102,
}

PLAN = """
# Chronic or not, from a diagnosis' description.
[plan]
name = "hospitals"
purpose = "Tell chronic from acute conditions by the wording of an ICD-10-CM description."
[model]
base = "sentence-transformers/all-MiniLM-L6-v2"
task = "text_classification"
labels = ["acute", "chronic"]
[lora]
r = 4
last_layers = 3
[data]
dataset = "diagnoses"
[rounds]
number = 72
evaluate_every = 4
[optimizer.site]
head_rounds = 40
[privacy]
mode = "record"
epsilon = 8.0
delta = 1e-5
clip = { head = 2.0, adapter = 2.0 }
rate = 0.06
"""

# (own model, federated, pooled) on each site's own held-out data, macro-F1
BY_SITE = [
    (0.671, 0.742, 0.781),
    (0.702, 0.813, 0.829),
    (0.655, 0.798, 0.802),
    (0.748, 0.727, 0.752),
    (0.689, 0.801, 0.795),
    (0.815, 0.784, 0.811),
    (0.700, 0.769, 0.790),
]


class Synthetic:
    """One run's worth of facts; `write` puts them into a run directory."""

    def __init__(
        self,
        *,
        sites=None,
        rounds=72,
        private=True,
        seeded=False,
        causal=False,
        baselines=True,
        stop_after=None,
        faults=True,
        probe=0.822,
        bare=False,
    ):
        self.sites = HOSPITALS if sites is None else sites
        self.names = list(self.sites)
        self.rounds, self.private, self.seeded, self.causal = rounds, private, seeded, causal
        self.baselines, self.stop_after, self.faults = baselines, stop_after, faults
        self.probe, self.bare = probe, bare
        self.refused = self.names[1] if faults and len(self.names) > 3 else None
        self.rng = np.random.default_rng(7)
        self.head_rounds = 0 if causal else rounds * 40 // 72

    def write(self, parent: Path) -> Path:
        run = RunDirectory.create(parent, "hospitals", plan_toml=PLAN)
        run.write_json("resolved.json", self.resolved(run.name))
        self.events(run)
        if self.stop_after is None:
            alone = {"federated", "majority", "base"}
            methods = [m for m in self.methods() if self.baselines or m["key"] in alone]
            if not self.bare:
                labels = {} if self.causal else self.labels()
                run.write_json(
                    "results.json", {"methods": methods, "view": "simulator", "labels": labels}
                )
            run.write_json("privacy.json", self.privacy())
        return run.root

    def plan(self) -> Plan:
        changes = {"rounds.number": self.rounds, "plan.seed": 1 if self.seeded else None}
        changes["optimizer.site.head_rounds"] = self.head_rounds
        if not self.private:
            changes |= {"privacy.mode": "none", "privacy.clip": None}
            changes |= {"privacy.epsilon": None, "privacy.delta": None}
        if self.causal:
            changes |= {"model.task": "causal_lm", "model.labels": []}
            changes |= {"privacy.clip": 1.0} if self.private else {}
        path = Path(__file__)
        import tomllib

        base = Plan.from_mapping(tomllib.loads(PLAN), source=str(path))
        if self.causal:  # in one go: halfway the plan would be invalid
            raw = base.model_dump(mode="json", exclude_none=True)
            raw["model"] |= {"task": "causal_lm", "labels": []}
            raw["optimizer"]["site"]["head_rounds"] = 0
            raw["privacy"]["clip"] = 1.0
            base = Plan.from_mapping(raw)
            changes.pop("model.task")
        return base.override(changes)

    def resolved(self, name):
        plan = self.plan()
        return {
            "run": name,
            "plan": plan.model_dump(mode="json"),
            "plan_sha256": plan.sha256,
            "engine": "processes",
            "workers": 2,
            "seed": 1 if self.seeded else None,
            "versions": {
                "silotune": "0.1.0",
                "torch": "2.13.0",
                "flwr": "1.41.0",
                "peft": "0.21.2",
            },
            "machine": "2 cores, Linux 6.1, x86_64",
            "model": "BERT, 6 layers, hidden 384, 22.7 M parameters, float32 on cpu, eager attention",
            "trainable_parameters": 19202,
            "sites": [{"name": n, "declared_units": round(u, -2)} for n, u in self.sites.items()],
            "split": "by the SHA-256 of each record (20 % test, 10 % validation)",
            "selection": "hyper-parameters chosen on validation data only",
        }

    def score(self, number):
        level = 0.5 + 0.31 * (1 - math.exp(-number / 14)) + self.rng.normal(0, 0.006)
        if self.causal:
            loss = 3.1 - 1.2 * (1 - math.exp(-number / 20)) + self.rng.normal(0, 0.01)
            return {"loss": loss, "perplexity": math.exp(loss)}
        return {"accuracy": level + 0.03, "macro_f1": level}

    def events(self, run):
        run.append_event("run_started", run=run.name, sites=self.names, rounds=self.rounds)
        for name, units in self.sites.items():
            if name == self.refused:
                run.append_event("site_refused", site=name, code="ST-401")
            else:
                run.append_event(
                    "site_joined",
                    site=name,
                    declared_units=round(units, -2),
                    rate=0.06,
                    sigma=0.704,
                )
        cohort = [name for name in self.names if name != self.refused]
        last = self.rounds if self.stop_after is None else self.stop_after
        for number in range(1, last + 1):
            if number == 31 and self.faults:
                run.append_event("run_resumed", from_round=30)
            self.round(run, number, cohort)
        if self.stop_after is None:
            run.append_event("run_finished", rounds=self.rounds, seconds=71.4)
        else:
            run.append_event(
                "round_started", round=self.stop_after + 1, cohort=cohort, phase="head"
            )

    def round(self, run, number, cohort):
        phase = "head" if number <= self.head_rounds else "adapter"
        run.append_event("round_started", round=number, cohort=cohort, phase=phase)
        unit = 0.012 if phase == "head" else 0.21
        failed = (
            {cohort[0]} if self.faults and number in {12, 13, 50} and len(cohort) > 1 else set()
        )
        spent = {}
        for name in cohort:
            if name in failed:
                run.append_event(
                    "site_failed", round=number, site=name, code="ST-603", detail="not finite"
                )
                continue
            spent[name] = unit * self.rng.uniform(0.8, 1.3)
            run.append_event(
                "site_replied", round=number, site=name, train_seconds=spent[name], bytes=4 * 19202
            )
        epsilon = {name: self.epsilon(i, number) for i, name in enumerate(cohort)}
        train = sum(spent.values())
        size = 4 * (770 if phase == "head" else 19202)
        wait, aggregate = train / 2 * 1.08 + 0.004, 0.003 + 0.001 * self.rng.random()
        run.append_event(
            "round_finished",
            round=number,
            seconds=wait + aggregate + 0.002,
            train_seconds=train,
            wait_seconds=wait,
            aggregate_seconds=aggregate,
            bytes_up=size * len(spent),
            bytes_down=size * len(cohort),
            update_norm=0.3,
            **({"epsilon": epsilon} if self.private else {}),
        )
        if number % 4 == 0 or number == self.rounds:
            sites = {
                name: {k: v + self.rng.normal(0, 0.05) for k, v in self.score(number).items()}
                | {"n": units // 10}
                for name, units in self.sites.items()
            }
            run.append_event(
                "evaluated",
                round=number,
                view="simulator",
                split="validation",
                pooled=self.score(number),
                sites=sites,
            )

    def epsilon(self, index, number):
        return (7.98 - 0.02 * index) * math.sqrt(number / self.rounds)

    def privacy(self):
        if not self.private:
            return {
                "private": False,
                "statement": "trained without differential privacy",
                "sites": {},
            }
        return {
            "private": not self.seeded,
            "statement": "seeded: not private"
            if self.seeded
            else "(epsilon, delta)-differentially private per record, as stated for each site",
            "unit": "record",
            "adjacency": "add or remove one unit at one site",
            "delta": 1e-5,
            "sites": {
                name: {
                    "epsilon": self.epsilon(i, self.rounds),
                    "sigma": 0.704,
                    "rate": 0.06,
                    "steps": self.rounds,
                    "epsilon_by_round": [
                        [r, self.epsilon(i, r)] for r in range(1, self.rounds + 1)
                    ],
                }
                for i, name in enumerate(n for n in self.names if n != self.refused)
            },
        }

    def methods(self):
        table = [
            ("federated", "Federated LoRA", 0.817, 1, 66.2),
            ("majority", "Always \u201cacute\u201d", 0.36, None, None),
            ("own", "Each site's own data only", 0.624, 0, 61.0),
            ("personal", "Federated, with a head of one's own", 0.701, 2, 9.0),
            ("pooled", "Pooled records", 0.832, 2, 58.9),
            ("probe_federated", "Federated head-only probe", self.probe, 1, 1.9),
        ]
        if self.causal:
            table = [row for row in table if row[0] in {"federated", "own", "pooled"}]
            table.insert(1, ("base", "The base model as it came", 0.3, None, None))
        return [self.method(*row) for row in table]

    def method(self, key, title, score, column, seconds):
        trained = column is not None
        found = {
            "key": key,
            "title": title,
            "private": trained and self.private and not self.seeded,
            "epsilon": 8.0 if trained and self.private else None,
            "test": self.metrics(score),
            "by_site": self.by_site(column, key),
            "seconds": seconds,
            "examples_seen": 67100 if trained else 0,
        }
        if key in {"own", "personal"}:
            found["everywhere"] = {
                name: self.metrics(score + 0.01 * (index % 5 - 2))
                for index, name in enumerate(self.sites)
            }
        elif not self.causal:
            constant = key == "majority"
            found["recall"] = {
                "acute": 1.0 if constant else score + 0.03,
                "chronic": 0.0 if constant else score - 0.03,
            }
        return found

    def labels(self):
        """Shares of the labels at each site: from 20 % chronic to 80 %."""
        steps = max(1, len(self.sites) - 1)
        shares = [0.2 + 0.6 * index / steps for index in range(len(self.sites))]
        return {
            name: {"acute": 1 - share, "chronic": share}
            for name, share in zip(self.sites, shares, strict=True)
        }

    def metrics(self, score):
        if self.causal:
            return {"loss": 4 - 2 * score, "perplexity": math.exp(4 - 2 * score)}
        return {"accuracy": score + 0.021, "macro_f1": score}

    def by_site(self, column, key):
        found = {}
        for index, (name, units) in enumerate(self.sites.items()):
            score = 0.35 if column is None else BY_SITE[index % len(BY_SITE)][column]
            score += 0.004 if key.startswith("probe") else 0
            found[name] = {**self.metrics(score), "n": units // 4}
        return found


VARIANTS = {
    "private": {},
    "seeded": {"seeded": True},
    "plain": {"private": False, "probe": 0.79},
    "causal": {"causal": True},
    "partial": {"stop_after": 23},
    "started": {"stop_after": 0, "faults": False},
    "alone": {"baselines": False},
    "bare": {"baselines": False, "bare": True},
    "many": {"sites": {f"site-{i:03d}": 500 + 7 * i for i in range(60)}},
    "hostile": {
        "sites": {"<script>alert(1)</script>": 900, "$x_{$ \u202e\x07日本": 800, "a\"'&<b": 1200}
    },
}

if __name__ == "__main__":
    from silotune.report.report import write_report

    variant = sys.argv[2] if len(sys.argv) > 2 else "private"
    print(write_report(Synthetic(**VARIANTS[variant]).write(Path(sys.argv[1]))))
