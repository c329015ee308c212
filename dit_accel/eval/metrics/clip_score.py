"""CLIPScore: how well pictures fit their prompts, by a CLIP model of transformers 4 or 5."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from dit_accel.eval.metrics.weights import file_sha256
from dit_accel.eval.results.types import Extractor
from dit_accel.quiet import quiet

Frame = UInt8[np.ndarray, "h w 3"]


class ClipScore:
    """100 · max(cosine of a picture's and its prompt's embedding, 0).

    Pictures go through the model's own processor, on Pillow as when the models were published.

    Args:
        model: a local folder, or a model id on the Hub. Weights are read from safetensors only.
        revision: of a model id.
        device: where the model runs.

    Raises:
        ValueError: there is no CLIP model with safetensors weights there.
    """

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        import transformers

        source = str(model)
        local, revision = Path(source).is_dir(), revision or "main"
        # transformers 5 moved the Pillow processor; its default needs torchvision and resizes otherwise.
        processor = _either(transformers, "CLIPImageProcessorPil", "CLIPImageProcessor")
        try:
            with quiet():
                loaded = transformers.CLIPModel.from_pretrained(
                    source, use_safetensors=True, revision=revision
                )
                self.tokenizer: Any = transformers.CLIPTokenizer.from_pretrained(
                    source, revision=revision
                )
                self.processor: Any = processor.from_pretrained(source, revision=revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"clip={source!r}: no CLIP model with safetensors weights ({error}); accepted is a local folder "
                "with model, tokenizer and preprocessor_config.json, or a model id on the Hub"
            ) from None
        self.device = torch.device(device)
        # transformers 5 keeps the checkpoint's precision, which would move the score.
        self.model: Any = loaded.float().requires_grad_(False).eval().to(self.device)
        self.longest = int(self.model.config.text_config.max_position_embeddings)
        self.record = Extractor(
            id=Path(source).resolve().name if local else f"{source}@{revision}",
            sha256=_sha256(source, revision),
            resize="clip-processor",
        )

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts have more tokens than the model reads."""
        with quiet():
            tokens = self.tokenizer(list(prompts), truncation=False)["input_ids"]
        return [len(x) > self.longest for x in tokens]

    def prepare(self, frame: Frame) -> Float32[Tensor, "3 s1 s2"]:
        """A picture as the model gets it."""
        return self.processor(images=[frame], return_tensors="pt")["pixel_values"][0]

    @torch.no_grad()
    def text_embeddings(self, prompts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Of unit length; prompts are cut at the model's limit."""
        tokens = self.tokenizer(
            list(prompts),
            truncation=True,
            max_length=self.longest,
            padding=True,
            return_tensors="pt",
        ).to(self.device)
        return _unit(
            self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
        )

    @torch.no_grad()
    def image_embeddings(
        self, images: Sequence[Float32[Tensor, "3 s1 s2"]]
    ) -> Float[Tensor, "n d"]:
        """Of unit length, of prepared pictures."""
        batch = torch.stack(list(images)).to(self.device)
        return _unit(self.model.get_image_features(pixel_values=batch))

    def __call__(self, frames: Sequence[Frame], prompts: Sequence[str]) -> list[float]:
        """One score a picture."""
        return scores(
            self.image_embeddings([self.prepare(x) for x in frames]), self.text_embeddings(prompts)
        )


def scores(images: Float[Tensor, "n d"], texts: Float[Tensor, "n d"]) -> list[float]:
    """Of unit embeddings, pair by pair."""
    return (100 * (images * texts).sum(1)).clamp_min(0).tolist()


def _unit(features: Any) -> Tensor:
    # transformers 5 returns the projected embedding as a field.
    features = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _either(module: Any, *names: str) -> Any:
    for name in names:
        with contextlib.suppress(AttributeError, ImportError):
            return getattr(module, name)
    raise ImportError(f"transformers has none of {', '.join(names)}")


def _sha256(source: str, revision: str | None) -> str:
    """Of the weights file; of the hashes of all parts where there are several."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        # All of it is in the cache already.
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    files = sorted(folder.glob("model*.safetensors"))
    hashes = [file_sha256(x, "clip") for x in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
