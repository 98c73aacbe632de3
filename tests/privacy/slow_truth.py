"""Small models, and the gradients that they must give: one sequence at a time, in float64."""

import copy
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 23
CLASSES = 4


@dataclass(frozen=True)
class Shape:
    width: int = 12
    rank: int = 3
    rslora: bool = False
    twice: bool = False
    checkpointing: str = "none"  # none, reentrant, saved
    dropout: float = 0.0
    freeze: str = "none"  # none, a, b
    head_bias: bool = True


class Toy(nn.Module):
    """Embedding, two adapted layers, masked mean over positions, a trained head."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.first = nn.Linear(shape.width, shape.width)
        # A large epsilon: what is measured is the gradients, not how well a norm is conditioned.
        self.norm = nn.LayerNorm(shape.width, eps=0.1)
        self.second = nn.Linear(shape.width, shape.width + 3, bias=False)
        self.head = nn.Linear(shape.width + 3, CLASSES, bias=shape.head_bias)

    def block(self, x):
        x = x + torch.tanh(self.first(x))
        if self.shape.twice:
            x = x + torch.tanh(self.first(self.norm(x)))
        return torch.tanh(self.second(self.norm(x)))

    def forward(self, ids, mask):
        x = self.embedding(ids)
        if self.shape.checkpointing != "none" and self.training:
            reentrant = self.shape.checkpointing == "reentrant"
            x.requires_grad_(True)
            x = checkpoint(self.block, x, use_reentrant=reentrant)
        else:
            x = self.block(x)
        weight = mask / mask.sum(1, keepdim=True)
        return self.head((x * weight[..., None]).sum(1))


def randomise(model, seed):
    """B starts at zero, which makes the gradient of A zero: give it values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def toy(shape=None, *, seed=0):
    shape = shape or Shape()
    torch.manual_seed(seed)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=7,
        use_rslora=shape.rslora,
        lora_dropout=shape.dropout,
        target_modules=["first", "second"],
        modules_to_save=["head"],
    )
    model = get_peft_model(Toy(shape), config)
    randomise(model, seed)
    for name, parameter in model.named_parameters():
        if shape.freeze != "none" and f"lora_{shape.freeze.upper()}" in name:
            parameter.requires_grad_(False)
    return model.train()


def sequences(n, *, longest=7, seed=0):
    """A padded batch whose padding is filled with noise ids, and targets."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator)
    mask = (torch.arange(longest) < lengths[:, None]).float()
    ids = torch.randint(0, VOCABULARY, (n, longest), generator=generator)
    return {
        "ids": ids,
        "mask": mask,
        "target": torch.randint(0, CLASSES, (n,), generator=generator),
    }


def toy_losses(model, batch):
    mask = batch["mask"].to(next(model.parameters()).dtype)
    logits = model(batch["ids"], mask)
    return F.cross_entropy(logits, batch["target"], reduction="none")


def rows(batch, chosen):
    return {key: value[chosen] for key, value in batch.items()}


def trimmed(batch, row):
    """One sequence on its own, without padding."""
    one = rows(batch, slice(row, row + 1))
    length = int(one["mask"].sum())
    return {"ids": one["ids"][:, :length], "mask": one["mask"][:, :length], "target": one["target"]}


def alone(model, batch, losses=toy_losses, *, single=trimmed, count=None):
    """Gradient of each sequence's loss by itself: a list a sequence of tensors a parameter."""
    slow = copy.deepcopy(model).double()
    for module in slow.modules():
        if isinstance(module, Toy):
            module.shape = replace(module.shape, checkpointing="none")
    parameters = [p for p in slow.parameters() if p.requires_grad]
    n = count if count is not None else len(batch["target"])
    found = []
    for row in range(n):
        loss = losses(slow, single(batch, row)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        found.append([torch.zeros_like(p) if g is None else g for g, p in pairs])
    return found


def clipped_sum(gradients, units, n_units, groups):
    """Sum over units of their clipped gradients; `groups` are (indices of parameters, clip)."""
    total = [torch.zeros_like(g) for g in gradients[0]]
    for unit in range(n_units):
        own = [g for g, u in zip(gradients, units, strict=True) if u == unit]
        if not own:
            continue
        summed = [sum(parts) for parts in zip(*own, strict=True)]
        for indices, clip in groups:
            norm = math.sqrt(sum(float((summed[i] ** 2).sum()) for i in indices))
            factor = 1.0 if norm <= clip else clip / norm
            for i in indices:
                total[i] += factor * summed[i]
    return total


def relative_error(found, expected):
    difference = sum(
        float(((f.double() - e) ** 2).sum()) for f, e in zip(found, expected, strict=True)
    )
    return math.sqrt(difference / sum(float((e**2).sum()) for e in expected))
