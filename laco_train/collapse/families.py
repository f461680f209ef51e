"""Families as data: where each keeps its decoder stack, and which config lists follow the depth (issue 3).

A new family is one row. A family without a row works if it has one obvious uniform stack; a doubtful one is refused.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from laco_train.errors import InputError


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: what people call the family.
        model_type: ``config.model_type`` of its text model.
        stack: path of the ModuleList of decoder layers, from the causal LM.
        norm: path of the norm after the last layer, from the causal LM; None if there is none.
        per_layer: config lists with one entry a layer, cut with the stack.
        layer_indices: config lists that hold layer numbers, renumbered with the stack.
        experts: its layers hold unaligned experts, so that they can be dropped but not summed.
        note: what a user should know.
    """

    name: str
    model_type: str
    stack: str = "model.layers"
    norm: str | None = "model.norm"
    per_layer: tuple[str, ...] = ()
    layer_indices: tuple[str, ...] = ()
    experts: bool = False
    note: str = ""


_TYPES = ("layer_types",)
FAMILIES: tuple[Family, ...] = (
    Family("Llama", "llama"),
    Family("Mistral", "mistral", per_layer=_TYPES),
    Family("Mixtral", "mixtral", experts=True),
    Family("Qwen2", "qwen2", per_layer=_TYPES),
    Family("Qwen3", "qwen3", per_layer=_TYPES),
    Family("Qwen3-MoE", "qwen3_moe", per_layer=_TYPES, layer_indices=("mlp_only_layers",), experts=True),
    Family("Gemma2", "gemma2", per_layer=_TYPES, note="alternates sliding and full attention"),
    Family("Gemma3 (text)", "gemma3_text", per_layer=_TYPES, note="five sliding layers, then a full one"),
    Family("Phi-3", "phi3"),
    Family("SmolLM3", "smollm3", per_layer=("layer_types", "no_rope_layers"), note="every fourth layer without RoPE"),
    Family("OLMo2", "olmo2"),
    Family("Cohere2", "cohere2", per_layer=_TYPES, note="every fourth layer full attention without RoPE"),
    Family("GPT-OSS", "gpt_oss", per_layer=_TYPES, experts=True, note="alternates sliding and full attention"),
    Family("GPT-2", "gpt2", stack="transformer.h", norm="transformer.ln_f"),
    Family("GPT-NeoX", "gpt_neox", stack="gpt_neox.layers", norm="gpt_neox.final_layer_norm"),
    Family("OPT", "opt", stack="model.decoder.layers", norm="model.decoder.final_layer_norm"),
    Family("Falcon", "falcon", stack="transformer.h", norm="transformer.ln_f"),
    Family("Baichuan2", "baichuan", note="remote code; tested with a stand-in of the same shape"),
    Family("InternLM2", "internlm2", note="remote code; tested with a stand-in of the same shape"),
)

# Names that Transformers gives to lists with one entry a layer; an unlisted family is cut by these.
_KNOWN_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
# A layer of these kinds carries state along the sequence, or takes keys from another layer.
_HYBRID_WORDS = ("mamba", "linear", "recurrent", "conv", "ssm", "hybrid")


def submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at the dotted `path`, or None where the path leads nowhere."""
    for name in path.split("."):
        model = getattr(model, name, None)  # type: ignore[assignment]
        if model is None:
            return None
    return model


def family_of(model: PreTrainedModel) -> Family:
    """The row for `model`, or one made by discovery; InputError for a model that can't be collapsed safely."""
    config = model.config.get_text_config(decoder=True)
    refuse_unsupported(model.config, config)
    for family in FAMILIES:
        if family.model_type == config.model_type:
            return family
    return _discover(model, config)


def refuse_unsupported(config: PretrainedConfig, text: PretrainedConfig) -> None:
    """InputError for kinds of model in which a layer is more than a map from hidden states to hidden states."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError("model.source", f"{kind} is an encoder-decoder model; use a decoder-only causal LM")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError("model.source", f"this {kind} is quantised and its weights can't be summed; use the original")
    if text is not config:
        raise InputError("model.source", f"{kind} wraps a text model; save the text model alone and use that")
    if getattr(text, "num_kv_shared_layers", 0):
        raise InputError("model.source", f"layers of {kind} share keys and values, so none can be removed alone")
    types = {str(t) for t in getattr(text, "layer_types", None) or ()}
    hybrid = sorted(t for t in types if any(word in t for word in _HYBRID_WORDS))
    if hybrid:
        raise InputError("model.source", f"{kind} is a hybrid ({', '.join(hybrid)} layers); use a pure attention model")


def _discover(model: PreTrainedModel, config: PretrainedConfig) -> Family:
    depth = config.num_hidden_layers
    kind = config.model_type
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    uniform = [(n, m) for n, m in lists if len({type(layer) for layer in m}) == 1 and any(True for _ in m.parameters())]
    outer = [n for n, _ in uniform if not any(n.startswith(f"{other}.") for other, _ in uniform if other != n)]
    if len(outer) != 1:
        raise InputError(
            "model.source",
            f"{kind} has {len(outer)} stacks that could be its {depth} decoder layers; it needs a family row",
        )
    parent_path = outer[0].rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    norms = [n for n, child in parent.named_children() if "norm" in type(child).__name__.lower()]
    final = [n for n in norms if "emb" not in n]
    if len(final) != 1:
        raise InputError("model.source", f"{kind} has no single norm beside its decoder layers; it needs a family row")
    stack = model.get_submodule(outer[0])
    return Family(
        name=kind,
        model_type=kind,
        stack=outer[0],
        norm=f"{parent_path}.{final[0]}" if parent_path else final[0],
        per_layer=tuple(name for name in _KNOWN_PER_LAYER if getattr(config, name, None) is not None),
        experts=any("expert" in name for name, _ in stack.named_modules()),
        note="found by discovery",
    )
