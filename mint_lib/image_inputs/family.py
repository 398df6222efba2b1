"""What families of image students have in common, and what each must say about itself.

Goes in: decoded images, the student's tokenizer, image processor and config. Comes out: tensors of the images, the text
that stands for each image in a prompt, and what the model takes for a batch of prompt trees. It knows no conversation.

All of it works from the image processor and the model's config. The processor classes of transformers would add only
the text that stands for an image, and some of them cannot be made without torchvision.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mint_lib.errors import InvalidInput
from mint_lib.packing import PackedTrees, Tree

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedTokenizerBase

ImageInputs = Mapping[str, "torch.Tensor"]
"""What the images of one prompt became, by the name of the model's argument."""


class PreparedImages(NamedTuple):
    """The images of one prompt."""

    inputs: ImageInputs
    texts: list[str]
    """For each image, what takes the place of the one image token that the chat template writes for it."""


class ImageFamily(abc.ABC):
    """One family of image students. It pickles."""

    model_types: ClassVar[tuple[str, ...]]
    """`model_type` of the configs that belong to it."""
    image_tokens: ClassVar[tuple[str, ...]] = ()
    """Tokens that mark images, beside the image token itself: no text of a prompt may hold them."""
    needs_images: ClassVar[bool] = False
    """Whether a prompt without images cannot be read."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        image_processor: "BaseImageProcessor",
        model_config: "PretrainedConfig",
    ):
        """Read for a model of `model_config`.

        Raises:
            InvalidInput: the tokenizer does not know the model's image token.
        """
        self.image_processor = image_processor
        self.model_config = model_config
        self.image_token_id: int = model_config.image_token_id
        token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        if token is None:
            raise InvalidInput(
                f"the model's image token is number {self.image_token_id}, and its tokenizer has no such token. Give a "
                "folder whose tokenizer belongs to the model."
            )
        self.image_token: str = token

    @abc.abstractmethod
    def prepare(self, images: "Sequence[Image]") -> PreparedImages:
        """The RGB `images` of one prompt, of any sizes."""

    @abc.abstractmethod
    def count_features(self, inputs: ImageInputs) -> int:
        """How many image tokens of the prompt the model will fill from `inputs`."""

    @abc.abstractmethod
    def collate(
        self, image_inputs: Sequence[ImageInputs | None], trees: Sequence[Tree], batch: PackedTrees
    ) -> dict[str, Any]:
        """What the model takes beside ids and mask for rows of one tree each; at least one has images."""
