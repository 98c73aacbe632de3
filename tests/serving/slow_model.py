"""A model that answers when it is let go."""

import threading

from silotune.models.prediction import Prediction


class Slow:
    """Remembers what it was asked together."""

    def __init__(self):
        self.go, self.batches = threading.Event(), []

    def __call__(self, examples):
        self.go.wait(10)
        self.batches.append([example["text"] for example in examples])
        if any(example["text"] == "bad" for example in examples):
            raise RuntimeError("bad")
        return [Prediction(output=example["text"]) for example in examples]
