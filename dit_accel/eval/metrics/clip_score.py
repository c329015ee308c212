"""CLIPScore: how well pictures fit their prompts.

torchmetrics' clip_score expects tensors from `get_image_features`; transformers 5 returns objects.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor
from torch.nn.functional import cosine_similarity

from dit_accel.eval.metrics.features import Frame
from dit_accel.eval.metrics.networks import file_sha256
from dit_accel.eval.results.types import Extractor
from dit_accel.quiet import quiet


class ClipScore:
    """100 · max(cosine of the embeddings of a picture and of its prompt, 0).

    Pictures are processed by the model's own processor on Pillow, as when the models were published.

    Args:
        model: a local folder, or a model id on the Hub. Weights are read from safetensors only.
        revision: branch, tag or commit of a model id.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        source = str(model)
        local, revision = Path(source).is_dir(), revision or "main"
        at: dict[str, Any] = {"revision": revision}
        try:
            with quiet():
                loaded: Any = CLIPModel.from_pretrained(source, use_safetensors=True, **at)
                self.tokenizer: Any = CLIPTokenizer.from_pretrained(source, **at)
                # The default processor needs torchvision and resizes in another way.
                self.processor: Any = CLIPImageProcessorPil.from_pretrained(source, **at)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"clip={source!r}: no CLIP model with safetensors weights ({error}): must be a local folder with "
                "model, tokenizer and preprocessor_config.json, or a model id on the Hub"
            ) from None
        self.device = torch.device(device)
        # float32, because transformers keeps the checkpoint's precision, which would change the score.
        self.model: Any = loaded.float().requires_grad_(False).eval().to(self.device)
        self.longest = int(self.model.config.text_config.max_position_embeddings)
        self.record = Extractor(
            id=Path(source).resolve().name if local else f"{source}@{revision}",
            sha256=_sha256(source, revision),
            resize="clip-processor",
        )

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Return for each prompt whether it has more tokens than the model reads."""
        with quiet():
            tokens = self.tokenizer(list(prompts), truncation=False)["input_ids"]
        return [len(x) > self.longest for x in tokens]

    def prepare(self, frame: Frame) -> Float32[Tensor, "3 s1 s2"]:
        """Return a picture as the model reads it."""
        return self.processor(images=[frame], return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Float32[Tensor, "3 s1 s2"]], prompts: Sequence[str]
    ) -> list[float]:
        """Return the score of each prepared picture with its prompt, which is cut at the model's limit."""
        different = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(
            different,
            truncation=True,
            max_length=self.longest,
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        texts = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output[[different.index(x) for x in prompts]]
        pixels = torch.stack(list(images)).to(self.device)
        pictures = self.model.get_image_features(pixel_values=pixels).pooler_output
        return (100 * cosine_similarity(pictures, texts)).clamp_min(0).tolist()


def _sha256(source: str, revision: str) -> str:
    """Return the hash of the weights file; for several files the hash of their hashes."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        # from_pretrained has filled the cache.
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    hashes = [file_sha256(x, "clip") for x in sorted(folder.glob("model*.safetensors"))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
