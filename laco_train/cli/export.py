"""`export --checkpoint PATH --output DIR [--format F]`: a proven model folder from whatever holds a trained model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from laco_train.checks import check_export
from laco_train.cli.parsing import VerbParser
from laco_train.errors import InputError
from laco_train.files import home
from laco_train.manifest import MANIFEST, Manifest, faults, read_manifest, unlisted
from laco_train.settings import Dtype, ExportSettings

if TYPE_CHECKING:
    from laco_train.export.converted import Format


def parser() -> VerbParser:
    """The verb's parser."""
    p = VerbParser(
        prog="laco_train export",
        description="Write a trained model as a folder that is proven by loading it, for Transformers or another "
        "runtime.",
        print_config=None,
    )
    p.stray = "--checkpoint"
    what = "A .ckpt that fit wrote, in one file or in shards, the folder of a run or of a study's arm, or an export."
    p.add_argument("--checkpoint", type=str, required=True, help=what)
    output = "Folder to write; must not exist or be empty, or hold this very export, which is then uploaded."
    p.add_argument("--output", type=str, required=True, help=output)
    formats = "hf: Transformers; ctranslate2 and onnx: in float32; gguf: for llama.cpp. Each has an extra to install."
    p.add_argument("--format", type=Literal["hf", "ctranslate2", "onnx", "gguf"], default="hf", help=formats)
    dtype = "Type of the weights of hf; auto: that of the checkpoint."
    p.add_argument("--dtype", type=Dtype, default="auto", help=dtype)
    size = "Largest size of one weights file of hf: a number with KB, MB or GB."
    p.add_argument("--shard-size", type=str, default=ExportSettings.shard_size, help=size)
    adapter = "LoRA: merge it, or keep it as a peft adapter in the folder adapter of an hf export."
    p.add_argument("--adapter", type=Literal["merge", "keep"], default="merge", help=adapter)
    p.add_argument("--gguf-type", type=Literal["f16", "q8_0"], default="f16", help="Type of the matrices of gguf.")
    where = "Folder of llama.cpp's repository, or of the unpacked sdist of llama-cpp-python; gguf needs its converter."
    p.add_argument("--llama-cpp", type=str | None, default=None, help=where)
    unproven = "Write gguf without llama-cpp-python to prove it; it is then read back by Transformers only."
    p.add_argument("--unproven", action="store_true", help=unproven)
    measured = "evaluation.json of evaluate, for the model card; NAME=FILE says which model in it is this one."
    p.add_argument("--evaluation", nargs="+", type=str, default=[], help=measured)
    trusted = "Run code that comes with the model of the checkpoint (Baichuan2, InternLM2), if you trust that code."
    p.add_argument("--trust-remote-code", action="store_true", help=trusted)
    push = "Upload the folder to this repository of the Hugging Face Hub, private if it is new; null: no upload."
    p.add_argument("--push-to-hub", type=str | None, default=None, help=push)
    p.add_argument("--dry-run", action="store_true", help="With --push-to-hub: show what would be sent instead.")
    return p


def run(args: list[str]) -> None:
    """Read the source, write and prove the folder, and upload it where that is asked for."""
    config = parser().parse_args(args)
    _check(config)
    output = home(config.output)
    earlier = _whole_export(output, config)

    from laco_train.export.hub import check_push, planned_push, push

    if config.push_to_hub is not None:
        check_push(config.push_to_hub, dry_run=config.dry_run)
    form = _format(config)
    _export(config, output, form, earlier)
    if config.push_to_hub is None:
        return
    if config.dry_run:
        print("\n".join(planned_push(output, config.push_to_hub)), flush=True)
    else:
        print(f"Uploaded to {push(output, config.push_to_hub)}", flush=True)


def _check(config: Any) -> None:
    """Refuse options that contradict each other."""
    check_export(ExportSettings(shard_size=config.shard_size))
    options = (
        ("dtype", "auto", "hf"),
        ("adapter", "merge", "hf"),
        ("shard_size", ExportSettings.shard_size, "hf"),
        ("gguf_type", "f16", "gguf"),
        ("llama_cpp", None, "gguf"),
    )
    for option, default, form in options:
        if config.format != form and config[option] != default:
            raise InputError(f"--{option.replace('_', '-')}", f"goes with --format {form} only; drop it")
    if config.format != "gguf" and config.unproven:
        raise InputError("--unproven", "goes with --format gguf only, as every other format is proven; drop it")
    if config.dry_run and config.push_to_hub is None:
        raise InputError("--dry-run", "goes with --push-to-hub; add it")


def _format(config: Any) -> "Format | None":
    """How to write another format than hf; InputError if what it needs is not there."""
    if config.format == "hf":
        return None

    from laco_train.export import ctranslate2, gguf, onnx
    from laco_train.export.converted import require

    if config.format == "ctranslate2":
        require("ctranslate2", ctranslate2.PACKAGES)
        return ctranslate2.Ctranslate2()
    if config.format == "onnx":
        require("onnx", onnx.PACKAGES)
        return onnx.Onnx()
    if not gguf.has_runtime() and not config.unproven:
        problem = "gguf can't be proven here: `pip install llama-cpp-python` (it compiles for minutes), or --unproven"
        raise InputError("--format", problem)
    require("gguf", gguf.PACKAGES)
    return gguf.Gguf(config.gguf_type, gguf.find_converter(config.llama_cpp), gguf.has_runtime())


def _whole_export(output: Path, config: Any) -> Manifest | None:
    """What is in `output`, as a dry run or a failed upload leaves it, whole; None: it is empty."""
    from laco_train.export.whole import refuse_nonempty

    if config.push_to_hub is None or not (output / MANIFEST).is_file():
        refuse_nonempty(output, "--output")
        return None
    manifest = read_manifest(output, "--output")
    wrong = faults(output, manifest) | dict.fromkeys(unlisted(output, manifest), "is not of the export in it")
    if wrong:
        name, problem = next(iter(wrong.items()))
        raise InputError("--output", f"{output} can't be uploaded: {name} {problem}; name another folder or empty it")
    return manifest


def _is_made_so(manifest: Manifest, output: Path, config: Any, dtype: str) -> bool:
    """Whether an export, its source aside, is what the options ask for.

    Args:
        dtype: of the weights of hf.
    """
    if config.format == "gguf":
        return f"model-{config.gguf_type}.gguf" in manifest.files
    if config.format != "hf":
        return True
    kept = any(name.startswith("adapter/") for name in manifest.files)
    largest = int(config.shard_size[:-2]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[config.shard_size[-2:]]
    fits = all(_fits(shard, largest) for shard in output.glob("*.safetensors"))
    stored = json.loads((output / "config.json").read_text(encoding="utf-8"))["dtype"]
    return kept == (config.adapter == "keep") and fits and stored == dtype


def _fits(shard: Path, largest: int) -> bool:
    """Whether a file of weights has `largest` bytes of them at most, or the one tensor that is larger."""
    from safetensors import safe_open

    header = 8 + int.from_bytes(shard.open("rb").read(8), "little")
    with safe_open(shard, "pt") as tensors:
        return shard.stat().st_size - header <= largest or len(tensors.keys()) == 1


def _export(config: Any, output: Path, form: "Format | None", earlier: Manifest | None) -> None:
    """Write `output`, unless `earlier`, which is there already, is just that; another one is refused."""
    from peft import PeftModel

    from laco_train.export import export_folder
    from laco_train.export.converted import export_converted
    from laco_train.export.huggingface import with_licence
    from laco_train.export.measured import merged, read_evaluations
    from laco_train.export.source import KEY, read_source
    from laco_train.precision import named_dtype
    from laco_train.training.loss import base_of

    keep = config.adapter == "keep"
    path = _find(home(config.checkpoint), adapters=keep)
    print(f"Reading {path}", flush=True)
    source = read_source(path, trust_remote_code=config.trust_remote_code)
    if keep and not isinstance(source.model, PeftModel):
        raise InputError(KEY, f"{path} has no adapter to keep (its model.method is not lora); drop --adapter keep")
    base = base_of(source.model)
    parameters = sum(p.numel() for name, p in base.named_parameters() if "lora_" not in name)  # as merged
    layers = base.config.get_text_config().num_hidden_layers
    measured = merged(source.card.evaluations, read_evaluations(config.evaluation, layers, parameters))
    plan, card = source.plan, replace(source.card, evaluations=measured)
    dtype = source.dtype if config.dtype == "auto" else named_dtype(config.dtype)
    if earlier is not None:
        about = json.loads(json.dumps({"format": config.format, "card": with_licence(card).to_dict()}))
        name = str(dtype).removeprefix("torch.")
        if earlier.export != about or not _is_made_so(earlier, output, config, name):
            raise InputError("--output", f"{output} holds another export than this; name another folder or empty it")
        print(f"export: {output} holds this export already, whole", flush=True)
        return
    if form is not None:
        export_converted(source.model, source.tokenizer, output, config.format, form, plan=plan, card=card)
        return
    export_folder(
        source.model,
        source.tokenizer,
        output,
        dtype=dtype,
        shard_size=config.shard_size,
        keep_adapter=keep,
        plan=plan,
        card=card,
    )


def _find(path: Path, *, adapters: bool) -> Path:
    """The checkpoint or model folder that `path` stands for.

    Args:
        path: a .ckpt, sharded or not, a model folder, or the folder of a finished run of fit or of a study's arm, of
            which the newest run is taken.
        adapters: whether LoRA must be apart still: a run's own export has it merged, its checkpoints don't.

    Raises:
        InputError: it is none of these.
    """
    from laco_train.cli.resume import newest_good
    from laco_train.export.source import KEY
    from laco_train.study.read import read_runs, rounds_of, study_folders
    from laco_train.training.sharded import is_sharded

    if path.is_file() or is_sharded(path) or (path / "config.json").is_file():
        return path
    if not path.is_dir():
        raise InputError(KEY, f"there is no {str(path)!r}; name a .ckpt, a run's folder or an exported model")
    runs = read_runs(next((version for version in study_folders(path.parent) if version.parent == path), path))
    if len(runs) != 1:
        raise InputError(KEY, f"{path} holds {len(runs)} runs; name one of them, such as {runs[0].folder}")
    run = runs[0]
    if run.export is not None and not adapters:
        return run.export
    parts = reversed(rounds_of(run.folder) or [run.folder])
    last = next((found for part in parts if (found := newest_good(part / "checkpoints"))), None)
    if last is None:
        raise InputError(KEY, f"{path} has no checkpoint{'' if adapters else ' and no export'}; name another run")
    return last
