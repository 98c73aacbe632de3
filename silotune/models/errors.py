"""What a base model is refused for once it is tried on texts."""

from __future__ import annotations

from silotune.errors import ModelError


class LengthRefused(ModelError):
    """data.max_length is more than the model takes."""

    code = "ST-306"
    title = "The plan's texts are longer than the model takes"
    cause = "data.max_length is above the number of tokens that the base model has positions for."
    advice = "Lower data.max_length in the plan to the number that the message gives."


class TextRefused(ModelError):
    """The model fails on texts."""

    code = "ST-307"
    title = "The model fails on texts"
    cause = "It takes no token ids, its tokenizer is another model's, or a layer of it failed."
    advice = "Use a text model together with its own tokenizer; the message names what failed."


class RecordsMixed(ModelError):
    """What the model makes of a record depends on other records."""

    code = "ST-308"
    title = "The model mixes the records of a batch"
    cause = "A public text's loss or gradient changed with the texts beside it or with its padding."
    advice = "Use another base model: clipping can't bound what one record does to the others."


class TokensSeenEarly(ModelError):
    """A model that sees the answer can't be taught to give it."""

    code = "ST-309"
    title = "The model sees the tokens that it is to predict"
    cause = "Another last token changed what the model predicts at earlier ones: it is an encoder."
    advice = "Use a decoder for causal_lm, or this model for text_classification."
