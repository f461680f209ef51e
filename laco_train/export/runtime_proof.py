"""Compares a model in another runtime with Transformers, in float32 on the CPU.

Shapes: T tokens, V vocabulary entries.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.errors import TrainingStopped

PROMPTS = (
    "The river rises in the northern hills, 1,204 metres above the sea, and flows south",
    "It is a truth universally acknowledged, that a single man",
    "def f(x):\n    return x ** 2  # a square\n\n\ndef",
    "Café, naïve, 北京的秋天很美。",
    "Question: What is the capital of France?\nAnswer:",
)
NEW_TOKENS = 64
PROMPT_TOKENS = 48
GAP = 1e-3
"""Two logits nearer than this may change places by rounding."""
AGREEMENT, DIVERGENCE = 0.97, 0.01
"""What a quantised model must reach: share of equal most likely tokens, mean KL in nats."""

Ids = list[int]


class Runtime(Protocol):
    """A model as another library runs it; one sequence of token ids is one list."""

    name: str

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """The `count` tokens that it adds to each prompt by greedy decoding, past any end of text."""

    def logits(self, sequences: Sequence[Ids]) -> list[Tensor]:
        """The (T, V) logits after each token of each sequence, on the CPU."""


@dataclass(frozen=True)
class RuntimeProof:
    """What was compared, and how near it was.

    Attributes:
        runtime: name of the runtime.
        prompts: prompts that were compared.
        tokens: greedy tokens compared, or positions where the quantised model was judged.
        flips: greedy tokens that differ, all where two logits are nearer than `GAP`.
        max_logit_difference: largest over all positions.
        agreement: share of positions with the same most likely token; None where greedy tokens were compared.
        divergence: mean KL of the runtime's next-token distribution from Transformers', nats; None likewise.
        seconds: time it took.
    """

    runtime: str
    prompts: int
    tokens: int
    flips: int
    max_logit_difference: float
    agreement: float | None
    divergence: float | None
    seconds: float

    def lines(self) -> list[str]:
        """The proof in words, a line each."""
        if self.agreement is None:
            flips = "no flip" if not self.flips else f"{self.flips} flips between logits less than {GAP:g} apart"
            result = f"{self.tokens} greedy tokens of {self.prompts} prompts as in Transformers ({flips})"
        else:
            result = (
                f"teacher-forced over {self.tokens} positions of {self.prompts} prompts: "
                f"top-1 agreement {self.agreement:.4f} (at least {AGREEMENT}), "
                f"mean KL {self.divergence:.5f} nats (at most {DIVERGENCE})"
            )
        return [
            f"{self.runtime}: {result}",
            f"{self.runtime}: largest logit difference {self.max_logit_difference:.3g}",
            f"{self.runtime}: compared in {self.seconds:.1f} s",
        ]


@torch.no_grad()
def prove_equal(reference: PreTrainedModel, runtime: Runtime, tokenizer: PreTrainedTokenizerBase) -> RuntimeProof:
    """Prove that greedy decoding in `runtime` gives what Transformers gives.

    Each token that the runtime chose must be the most likely one to Transformers too, given those before it, or less
    than `GAP` below it: then a flip does not end the comparison.

    Args:
        reference: in float32 on the CPU.
        runtime: has loaded what was written.
        tokenizer: of both.

    Raises:
        TrainingStopped: with the first token that differs, in one line.
    """
    start = time.perf_counter()
    prompts, count = prompts_for(reference, tokenizer)
    flips, worst = 0, 0.0
    added = runtime.greedy(prompts, count)
    texts = [prompt + new for prompt, new in zip(prompts, added, strict=True)]
    for prompt, new, text, found in zip(prompts, added, texts, runtime.logits(texts), strict=True):
        if len(new) != count:
            raise _failed(f"{runtime.name} gave {len(new)} tokens, not {count}")
        expected = text_logits(reference, text)
        worst = max(worst, _difference(expected, found, runtime.name))
        choices = expected[len(prompt) - 1 : -1]
        chosen = choices.gather(1, torch.tensor(new)[:, None])[:, 0]
        gaps = choices.max(dim=1).values - chosen
        if (gaps >= GAP).any():
            step = int((gaps >= GAP).nonzero()[0])
            best = int(choices[step].argmax())
            raise _failed(
                f"{runtime.name} chose token {new[step]} as new token {step} of prompt {prompts.index(prompt)}, whose "
                f"logit in Transformers is {gaps[step].item():.3g} below that of token {best}"
            )
        flips += int((gaps > 0).sum())
    seconds = time.perf_counter() - start
    return RuntimeProof(runtime.name, len(prompts), count * len(prompts), flips, worst, None, None, seconds)


@torch.no_grad()
def prove_near(reference: PreTrainedModel, runtime: Runtime, tokenizer: PreTrainedTokenizerBase) -> RuntimeProof:
    """Prove that a quantised model in `runtime` is near Transformers, teacher-forced on what Transformers writes.

    Raises:
        TrainingStopped: it agrees at fewer positions than `AGREEMENT`, or diverges by more than `DIVERGENCE`.
    """
    start = time.perf_counter()
    prompts, count = prompts_for(reference, tokenizer)
    texts = [prompt + greedy(reference, prompt, count) for prompt in prompts]
    agreed, divergence, positions, worst = 0, 0.0, 0, 0.0
    for text, found in zip(texts, runtime.logits(texts), strict=True):
        expected = text_logits(reference, text)
        worst = max(worst, _difference(expected, found, runtime.name))
        ours, theirs = (logits.double().log_softmax(dim=-1) for logits in (expected, found[:, : expected.shape[1]]))
        agreed += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
        divergence += (ours.exp() * (ours - theirs)).sum().item()
        positions += len(text)
    agreement, mean = agreed / positions, divergence / positions
    seconds = time.perf_counter() - start
    proof = RuntimeProof(runtime.name, len(prompts), positions, 0, worst, agreement, mean, seconds)
    if agreement < AGREEMENT or mean > DIVERGENCE:
        raise _failed(proof.lines()[0])
    return proof


Prove = Callable[[PreTrainedModel, Runtime, PreTrainedTokenizerBase], RuntimeProof]


def prompts_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Ids], int]:
    """The prompts as ids, and how many tokens to add: fewer and shorter where the model has few positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or NEW_TOKENS + PROMPT_TOKENS
    count = min(NEW_TOKENS, positions // 2)
    return [tokenizer(text)["input_ids"][: min(PROMPT_TOKENS, positions - count)] for text in PROMPTS], count


def text_logits(model: PreTrainedModel, ids: Ids) -> Tensor:
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def greedy(model: PreTrainedModel, prompt: Ids, count: int) -> Ids:
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    ids = torch.tensor([prompt])
    new: Ids = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()  # type: ignore[operator]
    return new


def greedy_by_checking(
    draft: PreTrainedModel, logits: Callable[[Sequence[Ids]], list[Tensor]], prompts: Sequence[Ids], count: int
) -> list[Ids]:
    """Greedy tokens of a runtime without a KV cache, in few passes: `draft` proposes, `logits` of the runtime decides.

    Each token is the runtime's own most likely one given those before it, so the draft changes the time alone: what it
    got right is taken, the first that it did not is replaced, and it proposes again from there.
    """
    texts = [list(prompt) for prompt in prompts]
    ends, lengths = [len(prompt) + count for prompt in prompts], [count] * len(prompts)
    while open_ := [i for i, text in enumerate(texts) if len(text) < ends[i]]:
        drafts = [texts[i] + greedy(draft, texts[i], min(lengths[i], ends[i] - len(texts[i]))) for i in open_]
        for i, text, found in zip(open_, drafts, logits(drafts), strict=True):
            start = len(texts[i])
            chosen: Ids = found[start - 1 : -1].argmax(dim=1).tolist()
            right = next((k for k, token in enumerate(chosen) if token != text[start + k]), len(chosen) - 1)
            texts[i] += chosen[: right + 1]
            lengths[i] = 2 * right + 1  # a draft that is seldom right is kept short
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _difference(expected: Tensor, found: Tensor, name: str) -> float:
    # some formats pad the vocabulary
    if found.shape[0] != expected.shape[0] or found.shape[1] < expected.shape[1]:
        raise _failed(f"{name} gave logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = (expected - found[:, : expected.shape[1]]).abs().max().item()
    if not difference < float("inf"):
        raise _failed(f"{name} gave logits that are not finite")
    return difference


def _failed(problem: str) -> TrainingStopped:
    return TrainingStopped(f"export: the proof failed, nothing was exported: {problem}")
