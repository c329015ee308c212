"""Tiny tokenizers and configs for the hub ids that diffusers' tests name (copied with diffusers_tests_plugin.py)."""

import string
from pathlib import Path


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _clip():
    from transformers import CLIPTokenizer

    letters = _byte_alphabet()
    # The tests' text encoders pool at the highest id, so the end token comes last.
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({x: i for i, x in enumerate(words)}, [], model_max_length=77)


def _t5():
    from transformers import T5Tokenizer

    letters = ["▁", *string.ascii_letters, *string.digits, *string.punctuation]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((x, -2.0) for x in letters)]
    return T5Tokenizer(vocabulary, extra_ids=0, model_max_length=512)


def _gemma():
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    words += [f"<0x{i:02X}>" for i in range(256)] + list(string.ascii_letters)
    tokenizer = GemmaTokenizer({x: i for i, x in enumerate(words)}, [])
    # Without it the empty negative prompt would have no token, and Lumina-Next gives NaN.
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words.index("<bos>"))])
    tokenizer.backend_tokenizer.post_processor = begin
    return tokenizer


def _qwen():
    from transformers import Qwen2Tokenizer

    letters = [*_byte_alphabet(), "<|endoftext|>"]
    return Qwen2Tokenizer({x: i for i, x in enumerate(letters)}, [])


def _llama():
    from transformers import LlamaTokenizer

    # The first ids as the tests' text encoders have them.
    words = ["<s>", "<pad>", "</s>", "<unk>", "▁", *(f"<0x{i:02X}>" for i in range(256))]
    words += string.ascii_letters
    return LlamaTokenizer({x: i for i, x in enumerate(words)}, [], pad_token="<pad>")


def _t5_config():
    from transformers import T5Config

    # No dropout: some tests leave the text encoder in training mode and compare two calls.
    sizes = {
        "vocab_size": 1103,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 5,
        "num_heads": 4,
    }
    return T5Config(**sizes, dropout_rate=0.0)


def _gemma_config():
    from transformers import GemmaConfig

    return GemmaConfig()


# Repository, or repository:subfolder.
REPOSITORIES = {
    "hf-internal-testing/tiny-random-t5": (_t5, _t5_config),
    "hf-internal-testing/tiny-random-clip": (_clip,),
    "hf-internal-testing/dummy-gemma": (_gemma, _gemma_config),
    "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": (_qwen,),
    "finetrainers/dummy-hunyaunvideo:tokenizer": (_llama,),
}


def fill_hub_cache() -> None:
    """Write the repositories in the layout of huggingface_hub's cache; offline, loaders look nowhere else."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for place, makers in REPOSITORIES.items():
        name, _, subfolder = place.partition(":")
        root = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        revision = "0" * 40
        if root.exists():
            continue
        for maker in makers:
            maker().save_pretrained(root / "snapshots" / revision / subfolder)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(revision)
