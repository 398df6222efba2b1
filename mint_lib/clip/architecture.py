"""The sizes of the small dual encoder, as a recipe states them.

Goes in: values. Comes out: `Architecture`. It loads without torch.
"""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Architecture(BaseModel):
    """A frozen EfficientNet-Lite0 beside a text tower trained from its first weight, for small machines."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    image_size: int = Field(default=128, ge=32, multiple_of=32)
    """Side of the square image in pixels."""
    hidden_size: int = Field(default=64, ge=8)
    """Width of the text transformer; a multiple of num_heads."""
    num_layers: int = Field(default=1, ge=1)
    """Layers of the text transformer."""
    num_heads: int = Field(default=4, ge=1)
    """Attention heads."""
    joint_size: int = Field(default=64, ge=8)
    """Width of the space where images and texts meet."""
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of activations dropped in training."""
    max_text_tokens: int = Field(default=77, ge=8)
    """Tokens of a window (CLIP: 77)."""
    min_word_count: int = Field(default=2, ge=1)
    """Words rarer than this in the training texts share one token."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError("hidden_size must be a multiple of num_heads")
        return self
