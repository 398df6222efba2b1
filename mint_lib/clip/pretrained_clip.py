"""A CLIP model of transformers as a dual encoder, for instance PLIP.

Goes in: a folder or hub name, or the facts and weights that a teacher was saved with. Comes out: an encoder that reads
images through the model's own processor, by Pillow. It imports torch at its top, so import it where it is needed.

Shape suffixes: B items, T tokens, S side in pixels, D joint width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mint_lib.clip.dual_encoder import DualEncoder
from mint_lib.errors import InvalidInput


class PretrainedClip(DualEncoder):
    """A CLIP model of transformers, all of it trained where training is asked for."""

    def __init__(self, model: Any, processor: Any):
        """`processor` is a Pillow image processor for `model`, a CLIPModel."""
        super().__init__()
        self.model, self._processor = model, processor
        self.image_size = int(model.config.vision_config.image_size)
        self.max_text_tokens = int(model.config.text_config.max_position_embeddings)
        self.joint_size = int(model.config.projection_dim)
        self.facts = {"clip": model.config.to_diff_dict(), "processor": processor.to_dict()}

    @classmethod
    def load(cls, source: str, *, revision: str | None) -> "tuple[PretrainedClip, Any]":
        """The encoder of a folder or hub name, and its tokenizer's backend.

        Raises:
            InvalidInput: it is no CLIP model in safetensors.
        """
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        try:
            model = CLIPModel.from_pretrained(
                source, revision=revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
            processor = CLIPImageProcessorPil.from_pretrained(source, revision=revision)
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{source} cannot be read as a CLIP model ({type(error).__name__}). Give the folder or hub name of one "
                "with weights in safetensors, its image processor and its tokenizer."
            ) from error
        return cls(model, processor), tokenizer.backend_tokenizer

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "PretrainedClip":
        """The encoder that `facts` describes, with weights yet to be given."""
        from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

        return cls(CLIPModel(CLIPConfig.from_dict(facts["clip"])), CLIPImageProcessorPil(**facts["processor"]))

    def read_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """RGB bytes [B, 3, S, S]."""
        return np.stack(images)

    def embed_images(self, images: np.ndarray) -> torch.Tensor:
        """Unit vectors [B, D]."""
        inputs = self._processor(images=list(images), input_data_format="channels_first", return_tensors="pt")
        output = self.model.get_image_features(pixel_values=inputs["pixel_values"].to(self.device))
        return nn.functional.normalize(output.pooler_output, dim=-1)

    def embed_windows(self, windows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Unit vectors [B, D]."""
        ids_BT, mask_BT = self._pad(windows, self.model.config.text_config.eos_token_id)
        output = self.model.get_text_features(input_ids=ids_BT, attention_mask=mask_BT)
        return nn.functional.normalize(output.pooler_output, dim=-1)

    def _log_scale(self) -> nn.Parameter:
        parameter: nn.Parameter = self.model.logit_scale
        return parameter
