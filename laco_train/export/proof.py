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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan
from laco_train.errors import InputError
from laco_train.export.runtime_proof import (
    PROMPTS,
    Ids,
    count_flips,
    failed,
    flips_in_words,
    greedy,
    greedy_steps,
    prompts_for,
    text_logits,
)
from laco_train.models.checks import UNREADABLE

PLAN_FILE = "collapse_plan.json"
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
        max_logit_difference: largest over all prompts and greedy tokens; 0, or there would be no proof.
        prompts: prompts that logits and generation were compared on.
        generated_tokens: greedy tokens, with a KV cache, that are those of the model in memory and those without one.
        flips: those among them that differ, all where two logits are nearer than `GAP`.
        bytes: size of the folder without its model card.
        seconds: time the proof took.
    """

    tensors: int
    max_logit_difference: float
    prompts: int
    generated_tokens: int
    flips: int
    bytes: int
    seconds: float

    def lines(self) -> list[str]:
        """The proof in words, a line each."""
        return [
            f"{self.tensors} weights equal bit for bit, {self.bytes / 1e6:,.1f} MB on disk",
            f"logits of {self.prompts} prompts and their greedy tokens equal, "
            f"largest difference {self.max_logit_difference:g}",
            f"{self.generated_tokens} greedy tokens as of the model in memory, equal with and without a KV cache "
            f"({flips_in_words(self.flips)})",
            f"proven in {self.seconds:.1f} s",
        ]


@dataclass(frozen=True)
class AdaptedText:
    """What a model with adapters made of a prompt.

    Attributes:
        ids: the prompt and the greedy tokens after it.
        new: how many those are.
        logits: (T, V), over all of `ids`.
    """

    ids: Ids
    new: int
    logits: Tensor


@dataclass(frozen=True)
class AdapterProof:
    """How near base and adapter, reloaded, were to the model in memory.

    Attributes:
        prompts: prompts that were compared.
        tokens: greedy tokens compared.
        flips: those that differ, all where two logits are nearer than `GAP`.
        max_logit_difference: largest over all prompts and greedy tokens.
    """

    prompts: int
    tokens: int
    flips: int
    max_logit_difference: float

    def lines(self) -> list[str]:
        """The proof in words, a line each."""
        flips = flips_in_words(self.flips)
        return [
            f"adapter: {self.tokens} greedy tokens of {self.prompts} prompts as of the model in memory ({flips})",
            f"adapter: largest logit difference {self.max_logit_difference:.3g}",
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
    # the loader's choice, as the one that trained may need a GPU
    duplicate.set_attn_implementation(reloaded.config._attn_implementation)
    tensors = _compare_weights(duplicate.state_dict(), reloaded.state_dict())
    _compare_tokenizer(folder, tokenizer, trust_remote_code=trusted)
    _compare_plan(folder, plan)
    prompts, count = prompts_for(duplicate, tokenizer)
    worst, flips = 0.0, 0
    for index, prompt in enumerate(prompts):
        new, cached = greedy_steps(reloaded, prompt, count)
        expected, difference = _compare_logits(duplicate, reloaded, prompt + new)
        choices = expected[-count - 1 : -1]
        _compare_cached(choices, cached)
        worst = max(worst, difference)
        flips += count_flips("the reloaded model", new, "the model in memory", choices, index)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Proof(tensors, worst, len(prompts), len(prompts) * count, flips, size, time.perf_counter() - start)


@torch.no_grad()
def adapted_texts(adapted: PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[AdaptedText]:
    """What `adapted`, in float32 on the CPU, makes of each prompt."""
    model: Any = adapted.get_base_model()  # its layers have the adapters inside
    prompts, count = prompts_for(model, tokenizer)
    texts = [prompt + greedy(model, prompt, count) for prompt in prompts]
    return [AdaptedText(ids, count, text_logits(model, ids)) for ids in texts]


@torch.no_grad()
def prove_adapter(
    folder: Path, adapter: Path, expected: list[AdaptedText], *, trust_remote_code: bool = False
) -> AdapterProof:
    """Prove that `adapter` on the base in `folder`, loaded by Transformers and peft, computes what is `expected`.

    Each token of the model in memory must be the most likely one to them too, given those before it, or less than
    `GAP` below it: greedy decoding then gives the same.

    Args:
        folder: of the base.
        adapter: peft's folder.
        expected: of `adapted_texts`.
        trust_remote_code: the base comes with code, which is running already.

    Raises:
        TrainingStopped: it can't be loaded, or differs by more than rounding.
    """
    base = _reload(folder, trust_remote_code=trust_remote_code)
    with _loading("adapter"):
        model: Any = PeftModel.from_pretrained(base, str(adapter)).eval().get_base_model()
    worst, flips = 0.0, 0
    for index, text in enumerate(expected):
        found = text_logits(model, text.ids)
        difference = (text.logits - found).abs().max().item()
        _demand(
            difference <= ADAPTER_TOLERANCE * text.logits.abs().max().item(),
            f"logits of base and adapter differ by {difference:.3g} from those of the model in memory",
        )
        worst = max(worst, difference)
        choices = found[-text.new - 1 : -1]
        flips += count_flips("the model in memory", text.ids[-text.new :], "base and adapter", choices, index)
    return AdapterProof(len(expected), sum(text.new for text in expected), flips, worst)


def _demand(holds: bool, problem: str) -> None:
    if not holds:
        raise failed(problem)


@contextmanager
def _loading(part: str) -> Iterator[None]:
    """Turn an error over the written `part` into a failed proof."""
    try:
        yield
    except (*UNREADABLE, RuntimeError) as error:
        raise failed(f"the {part} can't be loaded: {str(error)[:300]}") from error


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
    for parameter in reloaded.parameters():
        # files align tensors less than memory does, and matrix products may round by alignment
        parameter.data = parameter.data.clone()
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
    text = "\n".join(PROMPTS) + "".join(tokenizer.all_special_tokens)
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
        raise failed(str(error)) from error
    # by text, as a NaN in a plan is not equal to itself
    _demand(json.dumps(written.to_dict()) == json.dumps(plan.to_dict()), f"{PLAN_FILE} differs from the plan")


def _compare_logits(duplicate: PreTrainedModel, reloaded: PreTrainedModel, ids: Ids) -> tuple[Tensor, float]:
    """The (T, V) logits of `duplicate` on `ids`, and how far the others are from them at most, which must be 0."""
    expected, found = text_logits(duplicate, ids), text_logits(reloaded, ids)
    _demand(bool(expected.isfinite().all()), "the model's logits are not finite")
    difference = (expected - found).abs().max().item()
    if not torch.equal(expected, found):
        buffers = dict(reloaded.named_buffers())
        other = (name for name, value in duplicate.named_buffers() if not torch.equal(value, buffers[name].float()))
        cause = f"buffer {name} differs" if (name := next(other, None)) else "config.json gives another function"
        _demand(False, f"logits differ by up to {difference:.3g} on {len(ids)} tokens: {cause}")
    return expected, difference


def _compare_cached(uncached: Tensor, cached: Tensor) -> None:
    """Greedy steps with a KV cache against one pass over the same text without: (count, V) logits of each.

    They must agree to CACHE_TOLERANCE of the largest at each step.
    """
    differences = (uncached - cached).abs().amax(dim=1)
    within = differences <= CACHE_TOLERANCE * uncached.abs().amax(dim=1)
    if not within.all():
        step = int(within.logical_not().nonzero()[0])
        problem = "generation with a KV cache differs from that without"
        raise failed(f"{problem} at token {step}: logits by {differences[step].item():.3g}")
