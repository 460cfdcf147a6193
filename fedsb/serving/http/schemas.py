"""What clients of the server may ask, in OpenAI's words. What is not here is refused, and not silently passed over."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_CHOICES, MOST_STOPS = 16, 8


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a surrogate pair, which is not Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Base of all: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False


class Asked(Strict):
    """What completions and chat have in common."""

    model: Text = Field(max_length=256, description="a tenant's name, or the base model's")
    max_tokens: int | None = Field(None, ge=1, description="of the answer; by default what the server allows")
    temperature: float = Field(1.0, ge=0, le=2, description="0: the most likely token each time")
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="answers to one prompt")
    seed: int | None = Field(None, ge=0, lt=2**63, description="what is drawn follows from it")
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_embeds: str | None = Field(
        None, description="a soft prompt before the text: base64 of a safetensors file with a tensor `prompt` (tokens, width)"
    )
    user: str | None = Field(None, description="passed over")
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionAsked(Asked):
    """Body of /v1/completions."""

    prompt: Text | Annotated[list[int], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=5, description="how many alternatives to each token are told")


class TextPart(Strict):
    """Content in parts, of which only text is taken."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        """Its content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatAsked(Asked):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class AdapterAsked(Strict):
    """Body of /v1/load_lora_adapter and /v1/unload_lora_adapter: a name, never a path."""

    lora_name: Text = Field(max_length=256)
