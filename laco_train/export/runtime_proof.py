"""Compares a model in another runtime with Transformers, in float32 on the CPU.

Shapes: T tokens, V vocabulary entries.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
            flips = flips_in_words(self.flips)
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
    for index, (new, text, found) in enumerate(zip(added, texts, runtime.logits(texts), strict=True)):
        if len(new) != count:
            raise failed(f"{runtime.name} gave {len(new)} tokens, not {count}")
        expected = text_logits(reference, text)
        worst = max(worst, _difference(expected, found, runtime.name))
        flips += count_flips(runtime.name, new, "Transformers", expected[-count - 1 : -1], index)
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
        raise failed(proof.lines()[0])
    return proof


def count_flips(chooser: str, new: Ids, judge: str, choices: Tensor, prompt: int) -> int:
    """How many of the tokens that `chooser` chose are not the most likely ones to `judge`, all by less than `GAP`.

    Args:
        chooser: name of what chose.
        new: greedy tokens.
        judge: name of what they are compared with.
        choices: (len(new), V) logits of the judge, each given the tokens before.
        prompt: number of the prompt.

    Raises:
        TrainingStopped: a token's logit is `GAP` or more below the best one.
    """
    chosen = choices.gather(1, torch.tensor(new)[:, None])[:, 0]
    gaps = choices.max(dim=1).values - chosen
    if (gaps >= GAP).any():
        step = int((gaps >= GAP).nonzero()[0])
        best = int(choices[step].argmax())
        raise failed(
            f"{chooser} chose token {new[step]} as new token {step} of prompt {prompt}, whose logit in {judge} is "
            f"{gaps[step].item():.3g} below that of token {best}"
        )
    return int((gaps > 0).sum())


def flips_in_words(flips: int) -> str:
    """What `count_flips` counted."""
    return "no flip" if not flips else f"{flips} flips between logits less than {GAP:g} apart"


Prove = Callable[[PreTrainedModel, Runtime, PreTrainedTokenizerBase], RuntimeProof]


def prompts_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Ids], int]:
    """The prompts as ids, and how many tokens to add: fewer and shorter where the model has few positions."""
    positions = getattr(model.config, "max_position_embeddings", None) or 2 * NEW_TOKENS
    count = min(NEW_TOKENS, positions // 2)
    return [tokenizer(text)["input_ids"][: min(PROMPT_TOKENS, positions - count)] for text in PROMPTS], count


def text_logits(model: PreTrainedModel, ids: Ids) -> Tensor:
    """The (T, V) logits of one pass over `ids`, without a KV cache."""
    logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def greedy(model: PreTrainedModel, prompt: Ids, count: int) -> Ids:
    """The `count` tokens that greedy decoding with a KV cache adds to `prompt`, past any end of text."""
    return greedy_steps(model, prompt, count)[0]


def greedy_steps(model: PreTrainedModel, prompt: Ids, count: int) -> tuple[Ids, Tensor]:
    """As `greedy`, and the (count, V) logits that each token was chosen by."""
    own = model.generation_config
    # generate fills what a config passed to it leaves open from the model's, so that must go
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=count,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = torch.tensor([prompt])
    generate: Any = model.generate
    found = generate(ids, attention_mask=torch.ones_like(ids))
    model.generation_config = own
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits)


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
        raise failed(f"{name} gave logits of shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = (expected - found[:, : expected.shape[1]]).abs().max().item()
    if not difference < float("inf"):
        raise failed(f"{name} gave logits that are not finite")
    return difference


def failed(problem: str) -> TrainingStopped:
    """A failed proof, in one line."""
    return TrainingStopped(f"export: the proof failed, nothing was exported: {' '.join(problem.split())}")
