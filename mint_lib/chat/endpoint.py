"""Where a chat model answers, what it may be sent, and what that may cost.

Goes in: values of a recipe. Comes out: an `Endpoint` whose address is known to be allowed to see cases, and its key,
which only ever comes from the environment. It knows neither requests nor what is asked.
"""

import ipaddress
import os
import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mint_lib.errors import InvalidInput

# Narrower than RFC 3986, so that no two parsers can disagree on the host.
_ADDRESS = re.compile(
    r"https?://(?:(?P<name>[A-Za-z0-9.-]+)|\[(?P<ipv6>[0-9A-Fa-f:.]+)\])(?::\d{1,5})?(?:/[\w.~/-]*)?", re.A
)
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]{0,127}")
_LOCAL_NAMES = ("localhost", "ip6-localhost")


class Endpoint(BaseModel):
    """An OpenAI-compatible endpoint and how it is asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base_url: str
    """Address before `/chat/completions`, for instance `https://host/v1`."""
    model: str = Field(min_length=1, max_length=256)
    """Name of the model, as the endpoint spells it."""
    api_key_variable: str | None = None
    """Environment variable that holds the key; none: no key is sent."""
    allow_sending_cases_to: str | None = None
    """Host that may see cases; it must be the host of `base_url`. Not needed for a loopback address."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Which of OpenAI's two names for the longest answer the endpoint understands."""
    max_attempts: int = Field(default=6, ge=1, le=20)
    """Attempts at one call, where it was refused for a while (429, 5xx) or no whole answer came."""
    attempt_seconds: float = Field(default=60.0, gt=0.0, le=3600.0)
    """How long one attempt may take."""
    deadline_seconds: float = Field(default=300.0, gt=0.0, le=36_000.0)
    """How long one call may take, with all its attempts and the pauses between them."""
    num_concurrent: int = Field(default=4, ge=1, le=64)
    """Calls at the same time."""
    price_per_million_input: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Price of a million tokens sent, in any currency."""
    price_per_million_output: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """Price of a million tokens answered, in the same currency."""
    max_cost: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    """Budget of one run of the stage, in the same currency; none: no limit."""
    image_tokens: int = Field(default=6500, ge=1, le=1_000_000)
    """Tokens that the budget sets aside for an image until the endpoint has counted them; four tiles of 1,601, as Llama
    3.2 Vision has them, are among the largest."""

    @model_validator(mode="after")
    def _may_be_asked(self) -> Self:
        if _ADDRESS.fullmatch(self.base_url) is None:
            raise ValueError(
                "base_url must be an address such as https://host:8000/v1, in ASCII and without user, password, query "
                "or fragment; a key comes from the environment variable that api_key_variable names"
            )
        if self.api_key_variable is not None and not _VARIABLE.fullmatch(self.api_key_variable):
            raise ValueError(
                "api_key_variable must be the name of an environment variable (capital letters, digits, underscores), "
                "never the key itself"
            )
        if not self.is_local and (self.allow_sending_cases_to or "").casefold() != self.host:
            raise ValueError(
                f"cases would leave this machine for {self.host}: if they may be sent there, say so with "
                f"allow_sending_cases_to: {self.host}"
            )
        if self.max_cost is not None and not self.price_per_million_input + self.price_per_million_output:
            raise ValueError("max_cost needs prices: give price_per_million_input and price_per_million_output")
        return self

    @property
    def url(self) -> str:
        """Where chats are posted to."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    @property
    def host(self) -> str:
        """Host of the address, in small letters, without the port."""
        match = _ADDRESS.fullmatch(self.base_url)
        assert match is not None
        return (match["name"] or match["ipv6"]).casefold()

    @property
    def is_local(self) -> bool:
        """Whether the address is this machine's own loopback."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host in _LOCAL_NAMES

    def read_key(self) -> str | None:
        """The key, from the environment.

        Raises:
            InvalidInput: the variable is not set, or holds what cannot be a header.
        """
        if self.api_key_variable is None:
            return None
        key = os.environ.get(self.api_key_variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise InvalidInput(
                f"The environment variable {self.api_key_variable}, which api_key_variable names, "
                f"{'holds characters that no key has' if key else 'is not set'}. Set it to the endpoint's key."
            )
        return key

    def price(self, *, num_input_tokens: int, num_output_tokens: int) -> float:
        """What so many tokens cost."""
        millionth = 1e-6
        return millionth * (
            num_input_tokens * self.price_per_million_input + num_output_tokens * self.price_per_million_output
        )
