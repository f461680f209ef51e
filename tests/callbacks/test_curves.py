"""What TensorBoard shows of a run, each number against one computed apart from the run."""

import math
import re
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from laco_train.callbacks.curves import Curves
from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.settings import DataSettings, ScheduleSettings
from laco_train.training.data import PackedText
from laco_train.training.module import CausalLM
from laco_train.training.optim import learning_rate_factor
from tests.cli.runs import KEEP_ALL, TRAIN, VALIDATION, Project, Run, events, scalars
from tests.oracles.packing import packed_text


@pytest.fixture(scope="module")
def seen(run: Run) -> EventAccumulator:
    """The event file of the run."""
    return events(run.folder)


def collapsed_model(project: Project, run: Run) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(project.root / "model")
    return apply_plan(model, CollapsePlan.load(run.folder / "collapse_plan.json"))


def block_losses(model: PreTrainedModel, block: list[tuple[int, int, int]]) -> torch.Tensor:
    """Loss of each target of a block, every document of which is run by itself."""
    logits: list[torch.Tensor] = []
    starts = [i for i, (_, _, position) in enumerate(block) if position == 0] + [len(block)]
    for start, end in pairwise(starts):
        ids = torch.tensor([[token for token, _, _ in block[start:end]]])
        logits.append(model(ids, use_cache=False).logits[0])
    labels = torch.tensor([label for _, label, _ in block])
    losses = cross_entropy(torch.cat(logits)[:-1], labels[1:], reduction="none", ignore_index=-100)
    return losses[labels[1:] != -100]


@torch.no_grad()
def validation_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> float:
    ids = [[*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id] for text in VALIDATION]
    return float(torch.cat([block_losses(model, block) for block in packed_text(ids, 32)]).mean())


def test_validation_starts_right_after_the_collapse(
    seen: EventAccumulator, run: Run, shared_project: Project, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    points = scalars(seen, "val/loss")
    assert [step for step, _ in points] == [0, 2, 4, 6]
    assert points[0][1] == pytest.approx(
        validation_loss(collapsed_model(shared_project, run), tiny_tokenizer), rel=1e-5
    )
    trained = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    assert points[-1][1] == pytest.approx(validation_loss(trained, tiny_tokenizer), rel=1e-5)
    assert points[0][1] != pytest.approx(points[-1][1], rel=1e-3)


def test_original_is_measured_before_the_collapse(
    seen: EventAccumulator, shared_project: Project, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    original = AutoModelForCausalLM.from_pretrained(shared_project.root / "model")
    expected = validation_loss(original, tiny_tokenizer)
    points = scalars(seen, "val/loss_original")
    assert [step for step, _ in points] == [0, 2, 4, 6]  # a line to compare with
    assert [loss for _, loss in points] == pytest.approx([expected] * 4, rel=1e-5)
    assert expected != pytest.approx(scalars(seen, "val/loss")[0][1], rel=1e-4)


def test_perplexity_is_the_exponential(seen: EventAccumulator) -> None:
    losses, perplexities = scalars(seen, "val/loss"), scalars(seen, "val/perplexity")
    assert [step for step, _ in perplexities] == [step for step, _ in losses]
    assert [value for _, value in perplexities] == pytest.approx([math.exp(loss) for _, loss in losses])


def test_tokens_are_an_axis(seen: EventAccumulator) -> None:
    for tag in ("train/loss", "val/loss", "val/loss_original", "val/perplexity"):
        by_steps, by_tokens = scalars(seen, tag), scalars(seen, f"by_tokens/{tag}")
        if tag == "train/loss":  # Lightning counts a step from 0 here
            assert [tokens for tokens, _ in by_tokens] == [64, 128, 192, 256, 320, 384]
        else:
            assert [tokens for tokens, _ in by_tokens] == [64 * step for step, _ in by_steps]
        assert [value for _, value in by_tokens] == pytest.approx([value for _, value in by_steps])


def test_first_step_against_plain_torch(
    seen: EventAccumulator, run: Run, shared_project: Project, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    root = shared_project.root
    settings = DataSettings(
        train=str(root / "train.jsonl"), validation=str(root / "validation.jsonl"), block_size=32, batch_size=2
    )
    data = PackedText(settings, lambda: tiny_tokenizer)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    model = collapsed_model(shared_project, run)
    blocks = [
        list(zip(*(batch[name][i].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True))
        for i in range(2)
    ]
    loss = torch.cat([block_losses(model, block) for block in blocks]).mean()
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert scalars(seen, "train/loss")[0][1] == pytest.approx(loss.item(), rel=1e-5)
    assert scalars(seen, "train/gradient_norm")[0][1] == pytest.approx(norm.item(), rel=1e-4)


def test_learning_rate_is_the_schedules(seen: EventAccumulator) -> None:
    schedule = ScheduleSettings(warmup_steps=2, final_ratio=0.1)
    expected = [0.01 * learning_rate_factor(step, 6, schedule) for step in range(6)]
    assert [rate for _, rate in scalars(seen, "train/learning_rate")] == pytest.approx(expected)


def test_speed_is_seen(seen: EventAccumulator, run: Run) -> None:
    speeds = [speed for _, speed in scalars(seen, "train/tokens_per_second")]
    assert speeds
    assert min(speeds) > 0
    assert run.summary()["tokens_per_second"] > 0
    assert [tokens for _, tokens in scalars(seen, "train/tokens")][-1] == 384


def test_utilisation_is_operations_over_the_rate(
    seen: EventAccumulator, run: Run, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    summary = run.summary()
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(run.folder / "export").parameters())
    ids = [[*tiny_tokenizer.encode(text, add_special_tokens=False), tiny_tokenizer.eos_token_id] for text in TRAIN]
    lengths: list[int] = []
    for block in packed_text(ids, 32):
        starts = [i for i, (_, _, position) in enumerate(block) if position == 0] + [32]
        lengths += [end - start for start, end in pairwise(starts)]
    attended = sum(n * n for n in lengths) / sum(lengths)
    assert summary["flops_per_token"] == pytest.approx(6 * parameters + 6 * 4 * 32 * attended)
    assert re.search(r"^Matrix products: [\d,]+ [TG]FLOP/s in float32$", run.result.out, re.MULTILINE)
    rate = summary["matrix_product_flops"]
    speeds, shares = scalars(seen, "train/tokens_per_second"), scalars(seen, "train/mfu")
    assert [step for step, _ in shares] == [step for step, _ in speeds]
    expected = [summary["flops_per_token"] * speed / rate for _, speed in speeds]
    assert [share for _, share in shares] == pytest.approx(expected, rel=1e-5)
    assert summary["mfu"] == pytest.approx(summary["flops_per_token"] * summary["tokens_per_second"] / rate)


def test_peak_memory_is_that_of_the_process(seen: EventAccumulator) -> None:
    peaks = [peak for _, peak in scalars(seen, "train/peak_gib")]
    assert len(peaks) == 6
    assert peaks == sorted(peaks)  # a peak never falls
    status = Path("/proc/self/status").read_text()
    (now,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    assert 0.05 < peaks[-1] <= int(now) / 2**20 + 0.01


class ReadsOffTheDevice(TorchDispatchMode):
    """Notes the step of a Trainer at which a value is read off its device.

    The optimizer's own counters aside, which are on the CPU, and Transformers' look at the positions, which belongs to
    its way of packing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.trainer: Trainer | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        callers = [frame.filename for frame in traceback.extract_stack(limit=6)]
        inner = any("torch/optim/" in name or name.endswith("masking_utils.py") for name in callers)
        if func is torch.ops.aten._local_scalar_dense.default and not inner and self.trainer is not None:
            self.steps.append(self.trainer.global_step)
        return func(*args, **(kwargs or {}))


READS = ReadsOffTheDevice()


class WatchReads(Callback):
    """Counts from the first training batch to the last."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Training only."""
        READS.trainer = trainer

    def on_train_end(self, *_: Any) -> None:
        """What follows is no step."""
        READS.trainer = None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_are_read_off_the_device_at_the_interval_alone(project: Project, accumulate: int) -> None:
    READS.steps.clear()
    options = ["--trainer.log_every_n_steps=3", "--trainer.max_steps=8", "--trainer.val_check_interval=100"]
    options += ["--trainer.enable_progress_bar=true", "--export.enabled=false"]
    with READS:
        watch = f"--trainer.callbacks+={WatchReads.__module__}.WatchReads"
        run = project.fit(*options, watch, f"--trainer.accumulate_grad_batches={accumulate}")
    assert {3, 6} <= set(READS.steps) <= {0, 3, 6}
    loss = scalars(events(run.folder), "train/loss")[-1][1]
    assert f"train/loss: {loss:.3f}" in run.result.out  # the bar shows the last that was logged


def test_making_checkpoints_is_not_timed_and_they_are_named_by_their_step(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, state_dict = list[bool](), CausalLM.state_dict

    def gathered(module: CausalLM) -> dict[str, Any]:
        """What a strategy asks for first."""
        (curves,) = (callback for callback in module.trainer.callbacks if isinstance(callback, Curves))  # type: ignore[attr-defined]
        running.append(curves.clock.running)
        return state_dict(module)

    monkeypatch.setattr(CausalLM, "state_dict", gathered)
    options = [*KEEP_ALL, "--trainer.callbacks.every_n_train_steps=2", "--trainer.val_check_interval=3"]
    run = project.fit(*options, "--export.enabled=false")
    assert running
    assert not any(running)
    assert sorted(path.name for path in (run.folder / "checkpoints").glob("*step=[24]*")) == [
        "epoch=0-step=2.ckpt",
        "epoch=0-step=4.ckpt",
    ]
    assert run.summary()["training_seconds"] > 0
    saved = torch.load(run.checkpoint(4), weights_only=True)["callbacks"]
    (clock,) = (state["clock"] for name, state in saved.items() if name == "Curves")
    assert clock["tokens"] == 3 * 64  # of four steps all but the first, in which layers are compiled


def test_search_is_a_figure_and_the_plan_a_text(seen: EventAccumulator, run: Run) -> None:
    (image,) = seen.Images("collapse/similarity")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert min(image.width, image.height) > 300
    (text,) = seen.Tensors("collapse/plan/text_summary")
    words = text.tensor_proto.string_val[0].decode()
    plan = CollapsePlan.load(run.folder / "collapse_plan.json")
    assert "Collapsed 6 layers to 4" in words
    assert all(f"layer {merge.layer} took in" in words for merge in plan.merges)


def test_hyperparameters_are_those_of_the_recipe(seen: EventAccumulator, run: Run) -> None:
    logged = yaml.safe_load((run.folder / "hparams.yaml").read_text())
    assert logged["model.optimizer.learning_rate"] == 0.01
    assert logged["collapse.layers_per_merge"] == 2
    assert logged["collapse.highest_layer"] == "None"
    assert (logged["data.block_size"], logged["data.train"]) == (32, "train.jsonl")
    metadata = seen.SummaryMetadata("_hparams_/session_start_info")
    shown = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content)
    parameters = shown.session_start_info.hparams
    assert parameters["model.optimizer.learning_rate"].number_value == 0.01
    assert parameters["collapse.merge_rule"].string_value == "rdsc"
    assert set(parameters) == set(logged)


def test_interval_of_the_training_curve(project: Project) -> None:
    run = project.fit("--trainer.log_every_n_steps", "2", "--export.enabled", "false")
    seen = events(run.folder)
    for tag in ("train/loss", "train/gradient_norm", "train/learning_rate"):
        assert [step for step, _ in scalars(seen, tag)] == [1, 3, 5]
    assert [tokens for tokens, _ in scalars(seen, "by_tokens/train/loss")] == [128, 256, 384]


def test_no_interval_is_no_training_curve(project: Project) -> None:
    run = project.fit("--trainer.log_every_n_steps", "0", "--trainer.max_steps", "2", "--export.enabled", "false")
    seen = events(run.folder)
    assert "by_tokens/train/loss" not in seen.Tags()["scalars"]
    assert [step for step, _ in scalars(seen, "val/loss")] == [0, 2]


def test_accumulated_loss_is_not_divided(project: Project) -> None:
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", "--trainer.max_steps=2"]
    seen = events(project.fit(*options, "--export.enabled=false").folder)
    points = scalars(seen, "by_tokens/train/loss")
    assert [tokens for tokens, _ in points] == [128, 256]
    assert [loss for _, loss in points] == pytest.approx([loss for _, loss in scalars(seen, "train/loss")])
    assert points[0][1] > 4


def test_removal_by_hand_needs_no_figure(project: Project) -> None:
    options = ["--collapse.remove", "[3]", "--trainer.max_steps", "2", "--export.enabled", "false"]
    seen = events(project.fit(*options).folder)
    assert "collapse/similarity" not in seen.Tags()["images"]
    (text,) = seen.Tensors("collapse/plan/text_summary")
    assert "removed without a merge: 3" in text.tensor_proto.string_val[0].decode()


def test_the_last_step_of_an_epoch_may_be_shorter(shared_project: Project) -> None:
    """Four batches of 64 tokens, then the one that is left over; all of them count."""
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=2", "--trainer.limit_train_batches=5"]
    run = shared_project.fit(*epochs, "--trainer.accumulate_grad_batches=4", "--export.enabled=false")
    found = events(run.folder)
    assert scalars(found, "train/tokens") == [(0, 256), (1, 320), (2, 576), (3, 640)]
    assert [step for step, _ in scalars(found, "by_tokens/train/loss")] == [256, 320, 576, 640]
    assert [step for step, _ in scalars(found, "train/skipped_steps")] == [0, 1, 2, 3]
