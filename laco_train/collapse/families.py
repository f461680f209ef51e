"""Families as data: where each keeps its decoder stack, and which config lists follow the depth (issue 3).

A new family is one row. A family without a row works if it has one obvious uniform stack; a doubtful one is refused.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from laco_train.errors import InputError

POSITIONS = "positions"  # Transformers makes a mask from positions that restart
MASK = "mask"  # the model takes a mask, but makes none from positions
MASKS = "masks"  # the same, one for each type of layer
NOT_APART = "not apart"  # neither is known to help


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: what people call the family.
        model_type: ``config.model_type`` of its text model.
        stack: path of the ModuleList of decoder layers, from the causal LM.
        norm: path of the norm after the last layer, from the causal LM; None if there is none.
        per_layer: config lists with one entry a layer, cut with the stack.
        dense_layers: (config list of layers without experts, config entry n that gives experts to every n-th layer);
            the second is written into the first, as "every n-th" is wrong once a layer is gone.
        experts: its layers hold unaligned experts, so that they can be dropped but not summed.
        documents: how those packed into a block are kept apart: POSITIONS, MASK, MASKS or NOT_APART.
        note: what a user should know.
    """

    name: str
    model_type: str
    stack: str = "model.layers"
    norm: str | None = "model.norm"
    per_layer: tuple[str, ...] = ()
    dense_layers: tuple[str, str] | None = None
    experts: bool = False
    documents: str = POSITIONS
    note: str = ""


_TYPES = ("layer_types",)
_REMOTE = (
    "needs `model.trust_remote_code: true`; tested with a stand-in of the same module names; "
    "documents in a block see each other"
)
FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", per_layer=_TYPES),
    Family("Mixtral", "mixtral", experts=True),
    Family("Qwen2", "qwen2", per_layer=_TYPES),
    Family("Qwen3", "qwen3", per_layer=_TYPES),
    Family(
        "Qwen3-MoE",
        "qwen3_moe",
        per_layer=_TYPES,
        dense_layers=("mlp_only_layers", "decoder_sparse_step"),
        experts=True,
    ),
    Family("Gemma2", "gemma2", per_layer=_TYPES, note="alternates sliding and full attention"),
    Family("Gemma3 (text)", "gemma3_text", per_layer=_TYPES, note="five sliding layers, then a full one"),
    Family("Phi-3", "phi3"),
    Family("SmolLM3", "smollm3", per_layer=("layer_types", "no_rope_layers"), note="every fourth layer without RoPE"),
    Family("OLMo2", "olmo2"),
    Family("Cohere2", "cohere2", per_layer=_TYPES, note="every fourth layer full attention without RoPE"),
    Family(
        "GPT-OSS",
        "gpt_oss",
        per_layer=_TYPES,
        experts=True,
        documents=MASKS,
        note="alternates sliding and full attention",
    ),
    Family("GPT-2", "gpt2", stack="transformer.h", norm="transformer.ln_f"),
    Family("GPT-NeoX", "gpt_neox", stack="gpt_neox.layers", norm="gpt_neox.final_layer_norm"),
    Family("OPT", "opt", stack="model.decoder.layers", norm="model.decoder.final_layer_norm", documents=MASK),
    Family("Falcon", "falcon", stack="transformer.h", norm="transformer.ln_f", documents=MASK),
    Family("Baichuan2", "baichuan", documents=NOT_APART, note=_REMOTE),
    Family("InternLM2", "internlm2", documents=NOT_APART, note=_REMOTE),
)

# Names that Transformers gives to lists with one entry a layer; an unlisted family is cut by these.
_KNOWN_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
# A layer of these types, or with modules of these classes, carries state along the sequence.
_STATEFUL_TYPES = ("mamba", "linear", "recurrent", "conv", "ssm", "hybrid")
_STATEFUL_CLASSES = ("mamba", "rwkv", "recurrent", "deltanet", "shortconv", "lightning", "lstm")


def families_table() -> str:
    """The table of families in Markdown, as the README shows it."""
    lines = [
        "| family | `model_type` | layers at | merge rules | config lists cut with the layers | note |",
        "|" + "---|" * 6,
    ]
    for f in FAMILIES:
        rules = "drop" if f.experts else "rdsc, last, mean, drop"
        lists = ", ".join(f"`{name}`" for name in f.per_layer + (f.dense_layers or ())[:1])
        lines.append(f"| {f.name} | `{f.model_type}` | `{f.stack}` | {rules} | {lists} | {f.note} |")
    return "\n".join(lines)


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at the dotted `path`, or None where the path leads nowhere."""
    for name in path.split("."):
        model = getattr(model, name, None)  # type: ignore[assignment]
        if model is None:
            return None
    return model


def depth_of(config: PretrainedConfig) -> int:
    """Number of decoder layers that `config` asks for.

    Raises:
        InputError: a kind of model in which a layer is more than a map from hidden states to hidden states; the line
            says why and what to do.
    """
    kind = config.model_type
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("model.source", f"{kind} is an encoder-decoder model; use a decoder-only causal LM")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError("model.source", f"this {kind} is quantised and its weights can't be summed; use the original")
    if text is not config:
        raise InputError(
            "model.source",
            f"{kind} wraps a text model ({text.model_type}); put its language_model and lm_head into "
            "AutoModelForCausalLM.from_config(config.text_config), save that with the tokenizer, and name that folder",
        )
    if getattr(config, "num_kv_shared_layers", None):
        raise InputError(
            "model.source",
            f"layers of this {kind} take keys and values from others, so none can be removed alone; "
            "use a model whose layers share nothing",
        )
    types = {str(t) for t in getattr(config, "layer_types", None) or ()}
    _refuse_hybrid(kind, (t for t in types if any(word in t for word in _STATEFUL_TYPES)))
    return config.num_hidden_layers


def family_of(model: PreTrainedModel) -> Family:
    """The row for `model`, or one made by discovery; InputError for a model that can't be collapsed safely."""
    depth = depth_of(model.config)
    for family in FAMILIES:
        if family.model_type == model.config.model_type:
            return family
    return _discover(model, depth)


def _refuse_hybrid(kind: str, found: Iterable[str]) -> None:
    names = ", ".join(sorted(found))
    if names:
        raise InputError(
            "model.source", f"{kind} is a hybrid or recurrent model ({names}); use one whose layers all are attention"
        )


def _discover(model: PreTrainedModel, depth: int) -> Family:
    kind = model.config.model_type
    path = _only_stack(model, depth)
    stack = model.get_submodule(path)
    classes = {type(module).__name__ for module in stack.modules()}
    _refuse_hybrid(kind, (name for name in classes if any(word in name.lower() for word in _STATEFUL_CLASSES)))
    lists = [name for name, value in model.config.to_dict().items() if _is_list_of(value, depth)]
    unknown = [name for name in lists if name not in _KNOWN_PER_LAYER]
    if unknown:
        raise _needs_row(f"the config's {unknown[0]} may or may not follow its {depth} layers")
    holds_experts = any(word in name.lower() for name in classes for word in ("expert", "moe"))
    return Family(
        name=kind,
        model_type=kind,
        stack=path,
        norm=_only_norm(model, path),
        per_layer=tuple(lists),
        experts=holds_experts,
        note="found by discovery",
    )


def _is_list_of(value: Any, length: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == length


def _needs_row(problem: str) -> InputError:
    return InputError("model.source", f"{problem}; use a family that the README lists, or add a row to families.py")


def _only_stack(model: PreTrainedModel, depth: int) -> str:
    """Path of the one outermost ModuleList of `depth` layers of one class."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and len({type(layer) for layer in module}) == 1
    ]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) != 1:
        raise _needs_row(f"{model.config.model_type} has {len(outer)} stacks that could be its {depth} decoder layers")
    return outer[0]


def _only_norm(model: PreTrainedModel, stack: str) -> str:
    """Path of the one norm beside the stack; norms of embeddings aside."""
    parent = stack.rpartition(".")[0]
    children = model.get_submodule(parent).named_children()
    norms = [name for name, child in children if "norm" in type(child).__name__.lower() and "emb" not in name]
    if len(norms) != 1:
        raise _needs_row(f"{model.config.model_type} has {len(norms)} norms beside its decoder layers, not one")
    return f"{parent}.{norms[0]}".lstrip(".")
