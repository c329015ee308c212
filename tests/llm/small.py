"""A tiny language model and its tokenizer as a folder, as save_pretrained writes it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .models import make

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{x: i + 3 for i, x in enumerate(letters)}}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.post_processor = processors.ByteLevel(trim_offsets=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if chat:
        made.chat_template = CHAT
    return made


def save(folder, chat: bool = True, **changes):
    """Write a Llama with random weights that never ends a text, and its tokenizer."""
    model = make("Llama", vocab_size=259, eos_token_id=None, **changes)
    model.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder
