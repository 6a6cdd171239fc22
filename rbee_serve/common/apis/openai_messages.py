"""OpenAI's requests as we take them. What we do not have is refused by name: silence would be a lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from rbee_serve.contract.api import PROMPT_MAX_CHARS, ChatMessage, LogitBias, NamedTool, StopStrings, TolerantMessage, Tool
from rbee_serve.contract.errors import InvalidRequest

#: Most answers that one request may ask for (``n`` times the number of prompts).
CHOICES_MAX = 16

# What we would have to ignore, and the values with which ignoring it changes nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "best_of": (1,),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "web_search_options": (),
    "echo": (False,),
}


def refuse(body: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]] = _UNSUPPORTED) -> None:
    """Raise InvalidRequest for a parameter that would change the answer and that we do not have.

    ``unsupported``: name -> values with which it changes nothing.
    """
    for name, harmless in unsupported.items():
        value = body.get(name)
        # `1 == True` in Python.
        if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
            raise InvalidRequest(f"{name}: not supported", field=name, hint="leave the parameter out")


class StreamOptions(TolerantMessage):
    """OpenAI's ``stream_options``."""

    include_usage: bool = False


class JsonSchemaFormat(TolerantMessage):
    """The schema of a ``response_format``."""

    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(TolerantMessage):
    """OpenAI's ``response_format``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def constraint(self) -> dict[str, Any] | None:
        """Return the schema that the text must follow, None for any text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None:
            raise InvalidRequest(
                "response_format.json_schema: required with the type json_schema", field="response_format.json_schema"
            )
        return self.json_schema.schema_


class OpenAIRequest(TolerantMessage):
    """What chat and text completions have in common."""

    model: str = Field(min_length=1, max_length=200)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1_000_000)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, le=2**32 - 1)
    stop: StopStrings | None = None
    logit_bias: LogitBias | None = None
    response_format: ResponseFormat | None = None
    n: int | None = Field(None, ge=1, le=CHOICES_MAX, description="independent answers; the seeds are seed, seed + 1, ...")


class ChatCompletionRequest(OpenAIRequest):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


_Text = Annotated[str, Field(min_length=1, max_length=PROMPT_MAX_CHARS)]
_Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_048_576)]


def _one_problem(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """Validate a union and report one problem instead of one for each of its members."""
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            f"a text of 1 to {PROMPT_MAX_CHARS} characters, a list of token ids, or 1 to {CHOICES_MAX} of either expected"
        ) from None


Prompts = Annotated[
    _Text | _Ids | Annotated[list[_Text] | list[_Ids], Field(min_length=1, max_length=CHOICES_MAX)], WrapValidator(_one_problem)
]


class CompletionRequest(OpenAIRequest):
    """``POST /v1/completions``: a prompt, or several, each as text or as token ids."""

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)

    def prompts(self) -> list[str] | list[list[int]]:
        """Return the prompts as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
