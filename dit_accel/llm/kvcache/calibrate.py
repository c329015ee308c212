"""`calibrate`: trains product-quantisation codebooks on the keys and values of a model."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dit_accel.config.base import check, check_choice, is_int
from dit_accel.environment import versions
from dit_accel.llm.control import attention_layers
from dit_accel.llm.kvcache.cache import model_sizes
from dit_accel.llm.kvcache.codebooks import PAIRINGS, ROPES, SCOPES, CodebookForm, Codebooks
from dit_accel.llm.kvcache.kmeans import kmeans
from dit_accel.llm.kvcache.model_file import fingerprint_of
from dit_accel.llm.kvcache.rotation import Rotation
from dit_accel.llm.kvcache.store import ModelSizes
from dit_accel.llm.loading import ModelSource
from dit_accel.llm.search.samples import make_samples
from dit_accel.llm.search.settings import SearchSettings

SHAPES = {4: (2, 8), 3: (2, 6), 2: (4, 8)}
"""Number of channels of a sub-vector and of bits of its code, by bits per value."""
VECTORS = 32
"""Maximum number of training vectors per centroid. More vectors are subsampled at random."""
TRIED = 32
"""Number of tokens on which `check_rotation` tests a rotation."""
SHIFT = 37
"""Shift of the positions between the two runs of `check_rotation`."""
ALIKE = 0.1
"""Largest relative difference of keys before RoPE between the two runs: far above bf16 rounding, far below the effect of a
wrong rotation."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Settings of `dit-accel llm calibrate`."""

    bits: int = 4
    """Bits of a stored value: 4, 3 or 2."""
    scope: str = "head"
    """See `CodebookForm`."""
    pairing: str = "planes"
    """See `CodebookForm`."""
    centred: bool = True
    """See `CodebookForm`."""
    rope: str = "before"
    """See `CodebookForm`."""
    texts: tuple[str, ...] = ("prose", "code")
    """prose, code, or paths of text files."""
    length: int = 2048
    """Tokens per sample. With `rope="after"` it should be the prompt length in use, because keys then depend on the position."""
    samples: int = 4
    """Number of samples from each text for training the codebooks."""
    checks: int = 1
    """Number of further samples from each text for measuring the errors."""
    sink: int = 64
    """Number of first tokens of each sample to skip, because caches keep these tokens exact."""
    rounds: int = 10
    """Maximum number of k-means rounds."""
    seed: int = 0
    """Seed of k-means."""

    def __post_init__(self) -> None:
        check_choice("bits", self.bits, tuple(SHAPES))
        check_choice("scope", self.scope, SCOPES)
        check_choice("pairing", self.pairing, PAIRINGS)
        check_choice("rope", self.rope, ROPES)
        self._texts()
        check("checks", self.checks, self.checks >= 1, "an int >= 1")
        check("rounds", self.rounds, is_int(self.rounds) and self.rounds >= 1, "an int >= 1")
        check("seed", self.seed, is_int(self.seed) and self.seed >= 0, "an int >= 0")
        ok = is_int(self.sink) and 0 <= self.sink < self.length
        check("sink", self.sink, ok, f"an int from 0 to {self.length - 1}")

    def form(self, sizes: ModelSizes) -> CodebookForm:
        """Return the codebook form for a model.

        Raises:
            ValueError: the head dimension cannot be divided into these sub-vectors.
        """
        width, bits = SHAPES[self.bits]
        if sizes.head_dim % (2 * width):
            raise ValueError(
                f"bits={self.bits}: head_dim={sizes.head_dim} must be a multiple of {2 * width}"
            )
        form = CodebookForm(
            sub_vectors=sizes.head_dim // width,
            bits=bits,
            scope=self.scope,
            pairing=self.pairing,
            centred=self.centred,
            rope=self.rope,
        )
        form.check_head_dim(sizes.head_dim)
        return form

    def read(self, tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return token ids of training samples and of held-out samples, from the second half of each text.

        Raises:
            ValueError: a text cannot be read or is too short.
        """
        found = make_samples(tokenizer, self._texts())
        return [x.ids for x in found if not x.held_out], [x.ids for x in found if x.held_out]

    def _texts(self) -> SearchSettings:
        return SearchSettings(
            texts=self.texts, length=self.length, samples=self.samples, checks=self.checks
        )


class Calibration:
    """Calibration whose arguments are checked before the model is loaded.

    Args:
        source: source of the model.
        settings: codebook form and texts.

    Raises:
        ValueError: a text is too short, or the settings do not fit the model.
    """

    def __init__(self, source: ModelSource, settings: CalibrationSettings) -> None:
        source.check_length("length", settings.length)
        self.source, self.settings = source, settings
        self.sizes = model_sizes(source.config)
        settings.form(self.sizes)
        self.samples = settings.read(source.tokenizer)

    def run(self, load: Callable[[], Any], *, show: bool = False) -> Codebooks:
        """Train codebooks and return them. Their `notes` contain the errors on held-out samples.

        Args:
            load: function that loads the model.
            show: show a progress bar on stderr.
        """
        return calibrate(load(), *self.samples, self.settings, name=self.source.name, show=show)


def calibrate(
    model: Any,
    samples: list[Int[Tensor, "1 l"]],
    held_out: list[Int[Tensor, "1 l"]],
    settings: CalibrationSettings,
    *,
    name: str = "",
    show: bool = False,
) -> Codebooks:
    """Train codebooks on the keys and values that a model computes for samples.

    Args:
        model: causal language model of transformers, not enabled with `kv=`.
        samples: token ids of each training sample.
        held_out: token ids of each sample for measuring the errors.
        settings: codebook form and training settings.
        name: name of the model in the file.
        show: show a progress bar on stderr.

    Raises:
        ValueError: the settings do not fit the model.
    """
    sizes = model_sizes(model.config)
    form = settings.form(sizes)
    tensors, rotation = {}, None
    if form.rope == "before":
        tensors["frequencies"] = frequencies_of(model, sizes.head_dim)
        rotation = Rotation(tensors["frequencies"].to(model.device))
        check_rotation(model, samples[0][:, :TRIED], rotation)
    seen, checked = (captured(model, x, settings.sink, rotation) for x in (samples, held_out))
    layers = tuple(seen)
    for at, letter in enumerate("kv"):
        vectors = [seen[i][at] for i in layers]
        planes = letter == "k" and form.pairing == "planes"
        if form.centred:
            means = torch.stack([x.mean(1) for x in vectors])
            vectors = [x - mean[:, None] for x, mean in zip(vectors, means, strict=True)]
            tensors[f"{letter}_mean"] = means.cpu()
        if planes:
            vectors = [x.unflatten(-1, (2, -1)).mT.flatten(-2) for x in vectors]
        with tqdm(total=len(vectors), desc={"k": "keys", "v": "values"}[letter], unit="layer", disable=not show) as bar:  # fmt: skip
            found = []
            for book, number in _books(vectors, form, settings):
                found.append(book)
                bar.update(number)
        tensors[letter] = torch.stack(found).cpu()
    books = Codebooks(form=form, sizes=sizes, layers=layers, tensors=tensors, model=name)
    return Codebooks(
        form=form,
        sizes=sizes,
        layers=layers,
        tensors=tensors,
        model=name,
        notes={
            "settings": {k: list(x) if isinstance(x, tuple) else x for k, x in asdict(settings).items()},
            "errors": errors(books, checked),
            "versions": versions(),
        },
        fingerprint=fingerprint_of(attention_layers(model)),
    )  # fmt: skip


@torch.no_grad()
def captured(
    model: Any, samples: list[Int[Tensor, "1 l"]], sink: int, rotation: Rotation | None = None
) -> dict[int, tuple[Float[Tensor, "h n d"], Float[Tensor, "h n d"]]]:
    """Return the keys and values of all samples in fp32, by layer. Layers with a sliding window are left out.

    Args:
        model: causal language model of transformers.
        samples: token ids of each sample.
        sink: number of first tokens of each sample to skip.
        rotation: rotation that is removed from the keys. Default: return keys after RoPE.

    Raises:
        ValueError: the model is enabled with `kv=`, or has no layer with full attention.
    """
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for ids in samples:
        cache = DynamicCache(config=model.config)
        model(ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        if type(cache) is not DynamicCache:
            raise ValueError(
                "model: uses a KV cache of dit_accel; call dit_accel.llm.disable(model) first"
            )
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer:
                assert layer.keys is not None
                assert layer.values is not None
                keys = layer.keys.float()
                if rotation is not None:
                    at = torch.arange(keys.shape[2], device=keys.device)[None, None]
                    keys = rotation.unturned(keys, at)
                pair = keys[0, :, sink:], layer.values[0, :, sink:].float()
                found.setdefault(i, []).append(pair)
    if not found:
        raise ValueError("model: must have at least one layer with full attention")
    return {
        i: (torch.cat([k for k, _ in x], 1), torch.cat([v for _, v in x], 1))
        for i, x in found.items()
    }


def frequencies_of(model: Any, head_dim: int) -> Float[Tensor, " half"]:
    """Return the RoPE frequencies of a model.

    Args:
        model: causal language model of transformers.
        head_dim: number of channels per head.

    Raises:
        ValueError: the model does not rotate channels i and i + d / 2 of whole heads with one set of frequencies.
    """
    found = [x for x in model.modules() if isinstance(getattr(x, "inv_freq", None), Tensor)]
    try:
        (rope,) = found
        positions = torch.arange(64, device=rope.inv_freq.device)[None]
        with torch.no_grad():
            cos, sin = rope(torch.zeros(1, device=positions.device), positions)
        angles = positions[0, :, None] * rope.inv_freq.float()
        scale = cos[0, 0, 0].float()
        for x, y in ((cos, angles.cos()), (sin, angles.sin())):
            torch.testing.assert_close(x[0].float(), torch.cat([y, y], 1) * scale)
        if cos.shape[-1] != head_dim:
            raise ValueError
    except (ValueError, TypeError, AssertionError):
        raise ValueError(_otherwise(model)) from None
    return rope.inv_freq.detach().float().cpu()


@torch.no_grad()
def check_rotation(model: Any, ids: Int[Tensor, "1 l"], rotation: Rotation) -> None:
    """Check that removing the rotation gives the same keys for the same text at shifted positions.

    Raises:
        ValueError: the keys differ, because the model pairs channels in another way or does not rotate all layers.
    """
    found: list[list[Tensor]] = []
    positions = torch.arange(ids.shape[1], device=model.device)
    for first in (0, SHIFT):
        cache = DynamicCache(config=model.config)
        at = (positions + first)[None]
        model(ids.to(model.device), position_ids=at, past_key_values=cache, use_cache=True)
        keys = [x.keys for x in cache.layers if type(x) is DynamicLayer]
        found.append([rotation.unturned(k, at[None]) for k in keys if k is not None])
    for one, other in zip(*found, strict=True):
        if (one - other).norm() > ALIKE * one.norm():
            raise ValueError(_otherwise(model))


def _otherwise(model: Any) -> str:
    return (
        f"rope='before': must be 'after' for {type(model).__name__}, which does not rotate channels i and i + d / 2 of "
        "whole heads in all layers with one set of frequencies"
    )


def errors(
    books: Codebooks, vectors: dict[int, tuple[Float[Tensor, "h n d"], Float[Tensor, "h n d"]]]
) -> dict[str, float]:
    """Return the relative quantisation errors of keys and of values (Frobenius norms), a mean over layers."""
    found: dict[str, list[float]] = {"keys": [], "values": []}
    for i, pair in vectors.items():
        for name, x, quantizer in zip(found, pair, books.quantizers(i, pair[0].device), strict=True):  # fmt: skip
            error = (quantizer.decode(quantizer.encode(x[None]))[0] - x).norm() / x.norm()
            found[name].append(float(error))
    return {name: sum(x) / len(x) for name, x in found.items()}


def _books(
    vectors: list[Float[Tensor, "h n d"]], form: CodebookForm, settings: CalibrationSettings
) -> Iterator[tuple[Float[Tensor, "_h m c w"], int]]:
    """Yield the centroids of the model or of each layer, and the number of layers that they cover."""
    generator = torch.Generator().manual_seed(settings.seed)
    most = VECTORS * 2**form.bits

    def some(x: Tensor) -> Tensor:
        if len(x) <= most:
            return x
        return x[torch.randperm(len(x), generator=generator)[:most].to(x.device)]

    def one(x: Tensor) -> Tensor:
        parts = some(x).unflatten(-1, (form.sub_vectors, -1)).movedim(1, 0).contiguous()
        return kmeans(parts, 2**form.bits, rounds=settings.rounds, seed=settings.seed)

    if form.scope == "model":
        yield one(torch.cat([x.flatten(0, 1) for x in vectors]))[None], len(vectors)
        return
    for x in vectors:
        heads = x if form.scope == "head" else x.flatten(0, 1)[None]
        yield torch.stack([one(head) for head in heads]), 1
