"""A folder with random weights of a Llama shape and a byte-level tokenizer trained on the embedded corpus.

    python benchmarks/random_llama.py --shape 7b --output /tmp/llama-2-7b-shape

For measuring speed and memory where no hub can be reached; its losses mean nothing.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.recipes import find

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "135m": (576, 1536, 30, 9, 3),
    "tiny": (64, 128, 32, 4, 2),
}


def train_tokenizer(entries: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `entries` entries."""
    tokenizer = Tokenizer(BPE())
    # cut at line breaks alone: cut at words, the corpus runs out of merges at 29,150 entries
    tokenizer.pre_tokenizer = Sequence([Split("\n", "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=entries, special_tokens=["</s>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def _texts() -> Iterator[str]:
    path = find("data", "austen.jsonl.gz")
    assert path is not None
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, **config: Any
) -> LlamaForCausalLM:
    """Random weights of a Llama shape, in eval mode, seeded; `config` overrides."""
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    values = LlamaConfig(
        **{
            "vocab_size": 32_000,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "dtype": dtype,
            **config,
        }
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with device:
        model = LlamaForCausalLM(values).eval()
    torch.set_default_dtype(torch.float32)
    return model


def build(shape: str, output: Path, device: torch.device) -> None:
    """Write the folder, bfloat16."""
    tokenizer = train_tokenizer(32_000)
    model = random_model(shape, device, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {model.num_parameters():,} parameters, {len(tokenizer)} tokenizer entries")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    build(options.shape, options.output, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
