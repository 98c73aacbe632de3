"""What a served model is asked and answers, as its OpenAPI document says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

MOST_EXAMPLES = 256
MOST_CHARACTERS = 100_000
MOST_MESSAGES = 256
MOST_NEW_TOKENS = 1 << 20

Text = Annotated[str, Field(min_length=1, max_length=MOST_CHARACTERS)]


class Strict(BaseModel):
    """A body in which nothing unknown may stand."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def predict_request(roles: Sequence[str]) -> type[BaseModel]:
    """The body of a request for predictions: ``examples``, each with a text for every role."""
    fields: dict[str, Any] = dict.fromkeys(roles, (Text, ...))
    example = create_model("Example", __base__=Strict, __doc__="What the model reads.", **fields)
    bound = Field(min_length=1, max_length=MOST_EXAMPLES)
    examples: Any = (Annotated[list[example], bound], ...)
    return create_model(
        "PredictRequest", __base__=Strict, __doc__="Examples, by role.", examples=examples
    )


class Predicted(BaseModel):
    """The answer of one example."""

    output: Any = Field(
        description="A label, labels, a number, spans or a text, as the task has it."
    )
    probabilities: dict[str, float] = Field(description="By label; empty where the task has none.")


class PredictReply(BaseModel):
    """One prediction an example, in order."""

    model: str
    predictions: list[Predicted]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ChatRequest(BaseModel):
    """As OpenAI's API has it; what this server can't do is refused, and unknown keys are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    model: str | None = None
    stream: bool = False
    n: Annotated[int, Field(ge=1, le=1)] = 1
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = Field(
        None, description="0, or none, writes the likeliest answer."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="Of the likeliest tokens, so much probability."
    )
    max_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] | None = Field(
        None, description="No answer is longer, nor than what the plan's data.max_length leaves."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_NEW_TOKENS)] | None = Field(
        None, description="As max_tokens; the smaller one holds."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="With one, the same conversation has the same answer."
    )


class Choice(BaseModel):
    """An answer; it ends by itself or at the plan's longest."""

    index: int = 0
    message: dict[str, str]
    finish_reason: Literal["stop"] = "stop"


class ChatReply(BaseModel):
    """As OpenAI's API has it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["silotune"] = "silotune"
    task: str
    reads: list[str] = Field(description="The roles of an example.")
    labels: list[str]
    plan_sha256: str


class ModelList(BaseModel):
    """As OpenAI's API has it: one model."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """That the server is up, and how many examples wait."""

    status: Literal["ok"] = "ok"
    waiting: int


class Fault(BaseModel):
    """What is wrong, as OpenAI's clients read it. Never quotes a text."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(None, description="Where in the body.")
    code: str = Field(description="Of docs/errors.md, or ST-000.")


class Problem(BaseModel):
    """Why there is no answer."""

    error: Fault
