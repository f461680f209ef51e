"""Proves a written folder: reload it in plain Transformers and compare with the model in memory, in float32.

Shapes: T tokens, V vocabulary entries.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan
from laco_train.errors import InputError, TrainingStopped
from laco_train.models.checks import UNREADABLE

PLAN_FILE = "collapse_plan.json"
PROMPT_TEXT = (
    "The river rises in the northern hills, 1,204 metres above the sea, and flows south through three old towns; "
    "Café, naïve, 北京的秋天很美。 def f(x): return x ** 2  # a square\n"
)
PROMPT_LENGTHS = (1, 7, 24, 64)
NEW_TOKENS = 16
# Cached and uncached passes multiply matrices of other shapes, so float32 rounding differs (2e-7 on small models,
# more on deep ones), while a broken cache is off by a share of the logits themselves.
CACHE_TOLERANCE = 1e-3
# of the same sums on tensors that lie otherwise in memory
ADAPTER_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Proof:
    """What was compared, and how near it was.

    Attributes:
        tensors: entries of the state dict, each bit-equal.
        max_logit_difference: largest over all prompts; 0, or there would be no proof.
        prompts: prompts that logits and generation were compared on.
        generated_tokens: greedy tokens that are equal with and without a KV cache.
        bytes: size of the folder.
        seconds: time the proof took.
    """

    tensors: int
    max_logit_difference: float
    prompts: int
    generated_tokens: int
    bytes: int
    seconds: float

    def lines(self) -> list[str]:
        """The proof in words, a line each."""
        return [
            f"{self.tensors} weights equal bit for bit, {self.bytes / 1e6:,.1f} MB on disk",
            f"logits of {self.prompts} prompts equal, largest difference {self.max_logit_difference:g}",
            f"{self.generated_tokens} greedy tokens equal with and without a KV cache",
            f"proven in {self.seconds:.1f} s",
        ]


@torch.no_grad()
def prove(
    folder: Path, duplicate: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: CollapsePlan | None
) -> Proof:
    """Prove that `folder` is `duplicate`; two float32 models on the CPU at most.

    Args:
        folder: what was written.
        duplicate: the `cpu_copy` it was written from; upcast to float32 in place, which loses nothing.
        tokenizer: the tokenizer that was written.
        plan: the plan that was written, or None.

    Raises:
        TrainingStopped: with the first difference found, in one line.
    """
    start = time.perf_counter()
    dtype = str(duplicate.dtype).removeprefix("torch.")
    trusted = duplicate.is_remote_code()  # the very code that is running already
    reloaded = _reload(folder, trust_remote_code=trusted)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype")
    _demand(written == dtype, f"config.json says dtype {written}, the weights are {dtype}")
    duplicate.float()
    for parameter in reloaded.parameters():
        # files align tensors less than memory does, and matrix products may round by alignment
        parameter.data = parameter.data.clone()
    # the loader's choice, as the one that trained may need a GPU
    duplicate.set_attn_implementation(reloaded.config._attn_implementation)
    tensors = _compare_weights(duplicate.state_dict(), reloaded.state_dict())
    _compare_tokenizer(folder, tokenizer, trust_remote_code=trusted)
    _compare_plan(folder, plan)
    prompts = prompt_ids(tokenizer, getattr(duplicate.config, "max_position_embeddings", None))
    worst = max(_compare_logits(duplicate, reloaded, prompt) for prompt in prompts)
    generated = sum(_compare_generation(reloaded, prompt) for prompt in prompts)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Proof(tensors, worst, len(prompts), generated, size, time.perf_counter() - start)


@torch.no_grad()
def adapted_logits(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The (1, T, V) logits of each fixed prompt, in float32."""
    positions = getattr(adapted.config, "max_position_embeddings", None)
    return [adapted(input_ids=ids, use_cache=False).logits for ids in prompt_ids(tokenizer, positions)]


@torch.no_grad()
def prove_adapter(folder: Path, adapter: Path, expected: list[Tensor], tokenizer: PreTrainedTokenizerBase) -> float:
    """Prove that `adapter` on the base in `folder`, loaded by Transformers and peft, gives the `expected` logits.

    Returns:
        The largest difference, as rounding leaves it.

    Raises:
        TrainingStopped: it can't be loaded, or differs by more than rounding.
    """
    base = _reload(folder, trust_remote_code=False)
    with _loading("adapter"):
        loaded = PeftModel.from_pretrained(base, str(adapter)).eval()
    worst = 0.0
    for before, after in zip(expected, adapted_logits(loaded, tokenizer), strict=True):
        difference = (before - after).abs().max().item()
        _demand(
            difference <= ADAPTER_TOLERANCE * before.abs().max().item(),
            f"logits of base and adapter differ by {difference:.3g} from those of the model in memory",
        )
        worst = max(worst, difference)
    return worst


def prompt_ids(tokenizer: PreTrainedTokenizerBase, positions: int | None) -> list[Tensor]:
    """Fixed prompts, each (1, T), of the lengths that leave room for new tokens in `positions` (None: no limit)."""
    ids = tokenizer(PROMPT_TEXT)["input_ids"]
    ids = ids * -(-max(PROMPT_LENGTHS) // len(ids))
    room = max(PROMPT_LENGTHS) if positions is None else positions - NEW_TOKENS
    lengths = sorted({max(1, min(length, room)) for length in PROMPT_LENGTHS})
    return [torch.tensor([ids[:length]]) for length in lengths]


def _failed(problem: str) -> TrainingStopped:
    return TrainingStopped(f"export: the proof failed, nothing was exported: {' '.join(problem.split())}")


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise _failed(problem)


@contextmanager
def _loading(part: str) -> Iterator[None]:
    """Turn an error over the written `part` into a failed proof."""
    try:
        yield
    except (*UNREADABLE, RuntimeError) as error:
        raise _failed(f"the {part} can't be loaded: {str(error)[:300]}") from error


def _reload(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    with _loading("model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    reloaded, report = loaded
    for kind in ("missing", "unexpected"):
        keys = sorted(report[f"{kind}_keys"])
        _demand(not keys, f"{kind} in the written weights: {', '.join(keys[:3])}")
    return reloaded.eval()


def _compare_weights(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> int:
    for name in expected.keys() ^ found.keys():
        _demand(False, f"{name} is {'not reloaded' if name in expected else 'reloaded but not in memory'}")
    for name, value in expected.items():
        other = found[name]
        _demand(value.shape == other.shape, f"{name} has shape {tuple(other.shape)}, not {tuple(value.shape)}")
        _demand(_same_bits(value, other), f"{name} differs from the model in memory")
    return len(expected)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells 0 from -0 and takes a NaN for itself."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _compare_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool) -> None:
    with _loading("tokenizer"):
        reloaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    _demand(reloaded.get_vocab() == tokenizer.get_vocab(), "the tokenizer's vocabulary differs from the one in memory")
    text = PROMPT_TEXT + "".join(tokenizer.all_special_tokens)
    ids = tokenizer(text)["input_ids"]
    _demand(reloaded(text)["input_ids"] == ids, "the tokenizer encodes otherwise than the one in memory")
    _demand(reloaded.decode(ids) == tokenizer.decode(ids), "the tokenizer decodes otherwise than the one in memory")
    _demand(reloaded.chat_template == tokenizer.chat_template, "the chat template differs from the one in memory")


def _compare_plan(folder: Path, plan: CollapsePlan | None) -> None:
    if plan is None:
        return
    try:
        written = CollapsePlan.load(folder / PLAN_FILE)
    except InputError as error:
        raise _failed(str(error)) from error
    # by text, as a NaN in a plan is not equal to itself
    _demand(json.dumps(written.to_dict()) == json.dumps(plan.to_dict()), f"{PLAN_FILE} differs from the plan")


def _compare_logits(duplicate: PreTrainedModel, reloaded: PreTrainedModel, prompt: Tensor) -> float:
    """Largest difference of the (T, V) logits on `prompt`, which must be 0."""
    expected = duplicate(input_ids=prompt, use_cache=False).logits
    found = reloaded(input_ids=prompt, use_cache=False).logits
    _demand(bool(expected.isfinite().all()), "the model's logits are not finite")
    difference = (expected - found).abs().max().item()
    if not torch.equal(expected, found):
        buffers = dict(reloaded.named_buffers())
        other = (name for name, value in duplicate.named_buffers() if not torch.equal(value, buffers[name].float()))
        cause = f"buffer {name} differs" if (name := next(other, None)) else "config.json gives another function"
        _demand(False, f"logits differ by up to {difference:.3g} on {prompt.shape[1]} tokens: {cause}")
    return difference


def _compare_generation(model: PreTrainedModel, prompt: Tensor) -> int:
    """Number of greedy tokens that are equal with and without a cache.

    Logits must agree to CACHE_TOLERANCE of their largest at each step; another token can then only be a tie within
    that tolerance, after which the two texts are no longer comparable.
    """
    uncached, cached = (_greedy_logits(model, prompt, use_cache=use_cache) for use_cache in (False, True))
    for step, (expected, found) in enumerate(zip(uncached, cached, strict=True)):
        difference = (expected - found).abs().max().item()
        _demand(
            difference <= CACHE_TOLERANCE * expected.abs().max().item(),
            f"generation with a KV cache differs from that without at token {step}: logits by {difference:.3g}",
        )
        if expected.argmax() != found.argmax():
            return step
    return len(uncached)


def _greedy_logits(model: PreTrainedModel, prompt: Tensor, *, use_cache: bool) -> tuple[Tensor, ...]:
    """The (1, V) logits of each step of greedy generation, of NEW_TOKENS steps whatever the model's own defaults."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        use_cache=use_cache,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    generate: Any = model.generate
    return generate(prompt, attention_mask=torch.ones_like(prompt)).logits
