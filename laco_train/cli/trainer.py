"""`fit` and `validate`, on LightningCLI: every Trainer option works, and the recipe's sections are our dataclasses."""

import signal
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from laco_train.callbacks.budget import StopAtBudget
from laco_train.callbacks.curves import Curves
from laco_train.callbacks.divergence import Divergence
from laco_train.callbacks.duration import EstimateDuration
from laco_train.callbacks.evaluate_at import EvaluateAt
from laco_train.callbacks.evaluate_tasks import EvaluateTasks
from laco_train.callbacks.event_files import MarkEventFiles
from laco_train.callbacks.garbage import FreezeGarbage
from laco_train.callbacks.kernels import ReportKernels
from laco_train.callbacks.layer_collapse import LayerCollapse
from laco_train.callbacks.memory import Memory
from laco_train.callbacks.newest_checkpoint import NewestCheckpoint
from laco_train.callbacks.opened_data import CheckOpenedData
from laco_train.callbacks.preemption import StopOnSignal
from laco_train.callbacks.progress import RunProgressBar
from laco_train.callbacks.samples import Moment, Samples
from laco_train.callbacks.seeds import SeedSteps
from laco_train.callbacks.stopped_early import StayStopped
from laco_train.callbacks.utilisation import Utilisation
from laco_train.checks import (
    check_budget,
    check_collapse,
    check_data,
    check_evaluation,
    check_export,
    check_limits,
    check_model,
    check_one_of,
)
from laco_train.cli.early_checks import check_start
from laco_train.cli.endings import ended_by_signal, leave_no_trace
from laco_train.cli.loggers import listed, logger_in, loggers_of, logs_in, replaces_own
from laco_train.cli.parsing import OneLineErrors, add_recipe_flag, resolve_arguments
from laco_train.cli.quiet import quieten
from laco_train.cli.ranks import ending_children, part_ranks, rank_zero_speaks_first
from laco_train.cli.record import RecordConfig, take_folder
from laco_train.cli.resume import (
    EarlierRun,
    RunIsFinished,
    check_options,
    claim,
    earlier_run,
    end_of,
    is_finished,
    refuse_other_recipe,
)
from laco_train.cli.summary import print_summary, write_summary
from laco_train.cli.timed_trainer import TRAINER_DEFAULTS, TimedTrainer, say_device
from laco_train.collapse import CollapsePlan
from laco_train.collapse.composition import from_the_first_model
from laco_train.errors import InputError, TrainingStopped
from laco_train.evaluation.in_run import prompts_of, questions_of
from laco_train.evaluation.samples import check_prompts
from laco_train.export import CardFacts, export_folder, refuse_nonempty, save_adapter
from laco_train.export.measured import of_run
from laco_train.models import load_config, load_tokenizer
from laco_train.precision import named_dtype, weights_dtype
from laco_train.settings import (
    SECTIONS,
    BudgetSettings,
    CollapseSettings,
    DataSettings,
    EvaluationSettings,
    ExportSettings,
    ModelSettings,
    RoundSettings,
    SpeedSettings,
)
from laco_train.training.checkpoint import read_checkpoint, rebuilt, refuse_other_layout
from laco_train.training.checkpoint_io import VerifiedCheckpointIO
from laco_train.training.data import PackedText
from laco_train.training.ddp import use_our_ddp
from laco_train.training.fused import check_kernels
from laco_train.training.memory import is_out_of_memory
from laco_train.training.module import CausalLM
from laco_train.training.parallel import check_sizes, gathered, refuse_strategy
from laco_train.training.told import told_of_run


class RecipeParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class RecipeCLI(LightningCLI):
    """LightningCLI whose sections are laco_train.settings."""

    _depth_of_folder = 3  # lightning_logs/<recipe>/version_N

    def __init__(self, args: list[str], recipe: str | None):
        self.recipe = recipe or "run"
        super().__init__(
            trainer_class=TimedTrainer,
            trainer_defaults=TRAINER_DEFAULTS,
            save_config_callback=RecordConfig,
            seed_everything_default=0,
            parser_class=RecipeParser,
            parser_kwargs={"prog": "laco_train", "print_config": "--print_config"},
            args=args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The Trainer's methods that are verbs, with the arguments that are not options."""
        data = {"model", "datamodule", "weights_only"}
        return {"fit": data | {"train_dataloaders", "val_dataloaders"}, "validate": data | {"dataloaders", "verbose"}}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that reads a recipe under --recipe."""
        kwargs.setdefault("print_config", "--print_config")
        parser = self.parser_class(**kwargs)
        add_recipe_flag(parser)
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            which = "the newest run of the recipe under lightning_logs, or that of --run; without one, start one"
            parser.add_argument("--resume", type=Literal["auto"] | None, help=f"auto: go on with {which}.")
            parser.add_argument("--run", type=str | None, help="Folder of the run that --resume goes on with.")
            where = "Where its runs go under lightning_logs, and its name; null: the recipe's name."
            parser.add_argument("--name", type=str | None, help=where)
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our sections, and the Trainer's."""
        for name, settings in SECTIONS.items():
            parser.add_class_arguments(settings, name)
        several = "Collapse and train several times in a row, each time what the time before left; null: once."
        order = "Round k, counted from 1, takes its blocks in the order of data.seed + k - 1."
        parser.add_argument("--rounds", type=list[RoundSettings] | None, default=None, help=f"{several} {order}")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})

    def _parse_ckpt_path(self) -> None:
        """Leave the checkpoint alone: LightningCLI would load it whole and let its values override the recipe."""

    def instantiate_classes(self) -> None:
        """Check the settings while nothing is written, then make module, data and trainer from them."""
        self.config_init = self.parser.instantiate(self.config)
        self.model_settings: ModelSettings = self._get(self.config_init, "model")
        self.collapse_settings: CollapseSettings = self._get(self.config_init, "collapse")
        self.data_settings: DataSettings = self._get(self.config_init, "data")
        self.export_settings: ExportSettings = self._get(self.config_init, "export")
        check_model(self.model_settings)
        check_collapse(self.collapse_settings)
        check_data(self.data_settings)
        check_export(self.export_settings)
        self.budget_settings: BudgetSettings = self._get(self.config_init, "budget")
        self.speed_settings: SpeedSettings = self._get(self.config_init, "speed")
        check_budget(self.budget_settings)
        self.evaluation_settings: EvaluationSettings = self._get(self.config_init, "evaluation")
        check_evaluation(self.evaluation_settings)
        if self.subcommand == "fit":
            self.recipe = self.config_init["fit"].name or self.recipe
        self.earlier = self._earlier_run() if self.subcommand == "fit" else None
        s = self.model_settings
        precision = str(self._get(self.config_init, "trainer").get("precision") or "32-true")
        self.dtype = weights_dtype(s.dtype, precision, s.method if self.subcommand == "fit" else None)
        self.load_tokenizer = partial(load_tokenizer, s.source, trust_remote_code=s.trust_remote_code)
        seed = self._get(self.config_init, "seed_everything")
        self.model = CausalLM(s, self.dtype, self.speed_settings, self.budget_settings, seed)
        self.datamodule = PackedText(self.data_settings, self.load_tokenizer)
        self.samples = Samples(prompts_of(self.evaluation_settings))
        self.collapse = self._collapse_callback()
        if self.subcommand == "validate" and self.checkpoint is None:
            check_one_of(self.config_init["validate"].rounds, self.collapse_settings)
        self.utilisation, self.memory = Utilisation(), Memory()
        self.curves = Curves(self.collapse, self.utilisation)
        tasks = questions_of(self.evaluation_settings) if self.subcommand == "fit" else []
        self.tasks = EvaluateTasks(self.evaluation_settings, tasks, self.load_tokenizer, self.curves)
        self.trainer = self.instantiate_trainer()
        check_sizes(self.trainer)
        if self.subcommand == "fit":
            check_kernels(self.speed_settings, self.trainer.strategy.root_device)
        if self.checkpoint is not None:
            refuse_other_layout(self.checkpoint, self.trainer, resuming=self.subcommand == "fit")
        say_device(self.trainer)
        self._check_against_model()

    def _earlier_run(self) -> EarlierRun | None:
        """What --resume goes on with; its checkpoint becomes that of fit."""
        given, trainer = self.config_init["fit"], self._get(self.config_init, "trainer")
        check_options(given.resume, given.run, given.ckpt_path, replaces_own(trainer.get("logger")))
        if given.resume is None:
            return None
        say = rank_zero_only(partial(print, flush=True))
        runs = logs_in(trainer) / self.recipe
        earlier = earlier_run(runs, given.run, say)
        if earlier is None:
            say(f"No run has begun in {runs} yet: this one is the first.")
            return None
        refuse_other_recipe(earlier, self._parser("fit").dump(self.config["fit"], skip_unset=False))
        if is_finished(earlier.folder, self.export_settings.enabled):
            raise RunIsFinished(end_of(earlier.folder))
        return self._go_on(earlier)

    def _go_on(self, earlier: EarlierRun) -> EarlierRun:
        say = rank_zero_only(partial(print, flush=True))
        if earlier.checkpoint is None:
            self.save_config_kwargs = {"overwrite": True}
            say(f"{earlier.folder} has no checkpoint yet: it begins anew.")
        else:
            self.config_init["fit"].ckpt_path = str(earlier.checkpoint)
            say(f"Going on from {earlier.checkpoint}.")
        return earlier

    def _check_against_model(self) -> None:
        s = self.model_settings
        config = load_config(s.source, trust_remote_code=s.trust_remote_code)
        positions = getattr(config, "max_position_embeddings", None)
        check_data(self.data_settings, positions)
        if self.samples.prompts:
            check_prompts(self.samples.prompts, self.load_tokenizer(), positions, "evaluation.prompts")
        if self.collapse.plan is None:
            say, trains = rank_zero_only(partial(print, flush=True)), self.subcommand == "fit"
            check_start(s, self.collapse_settings, config, self.dtype, trains=trains, say=say)

    def _collapse_callback(self) -> LayerCollapse:
        path = self._get(self.config_init, "ckpt_path")
        self.checkpoint = None if path is None else read_checkpoint(Path(path), "--ckpt_path")
        if self.checkpoint is None:
            seed = int(self._get(self.config_init, "seed_everything"))
            on_model = self._write_samples if self.samples.prompts else None
            return LayerCollapse(self.collapse_settings, self.recipe, seed=seed, on_model=on_model)
        checkpoint = self.checkpoint
        losses = {name: value for name, value in checkpoint.losses.items() if name != "trained"}
        return LayerCollapse(self.collapse_settings, self.recipe, checkpoint.plan, losses)

    def _write_samples(self, moment: Moment, model: nn.Module) -> None:
        self.samples.write(moment, model, self.load_tokenizer())

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with our callbacks, logging to lightning_logs/<recipe>/version_N unless told otherwise."""
        trainer_config = {**self._get(self.config_init, "trainer"), **kwargs}
        own = partial(self._logger, logs_in(trainer_config))
        trainer_config["logger"] = loggers_of(trainer_config.get("logger"), own)
        if self.budget_settings.max_tokens is not None and trainer_config.get("max_epochs") is None:
            trainer_config["max_epochs"] = -1  # else Lightning would end the run after 1000
        self.signals, seeds = StopOnSignal(), SeedSteps(self.model.seed)
        began_with = self.checkpoint.data if self.earlier is not None and self.checkpoint is not None else None
        opened = CheckOpenedData(began_with)
        callbacks: list[Callback] = [FreezeGarbage(), self.memory, opened, self.collapse, StopAtBudget()]
        callbacks += [self.utilisation, EstimateDuration(self.utilisation, self.checkpoint)]
        callbacks += [ReportKernels(), self.curves, EvaluateAt(self.curves), Divergence()]
        callbacks += [self.tasks] if self.tasks.tasks else []
        callbacks += [self.samples] if self.samples.prompts else []
        callbacks += [seeds, MarkEventFiles(), StayStopped(), self.signals, *self._checkpoints(trainer_config)]
        trainer_config["plugins"] = [*listed(trainer_config.get("plugins")), VerifiedCheckpointIO()]
        if trainer_config.get("enable_progress_bar") is not False:
            callbacks.append(RunProgressBar())
        refuse_strategy(trainer_config.get("strategy") or "auto")
        use_our_ddp()
        if self.subcommand == "fit":
            check_limits(trainer_config)
        try:
            return self._instantiate_trainer(trainer_config, callbacks)
        except (ValueError, TypeError) as error:  # an accelerator or strategy of no such name, devices below 0
            raise InputError("trainer", str(error).splitlines()[0]) from error

    def _logger(self, logs: Path) -> TensorBoardLogger:
        if self.earlier is None:
            return TensorBoardLogger(logs, name=self.recipe, default_hp_metric=False)
        return logger_in(self.earlier.folder)

    @staticmethod
    def _checkpoints(trainer_config: dict[str, Any]) -> list[Checkpoint]:
        """Ours, unless the recipe names another or wants none."""
        named = any(isinstance(callback, Checkpoint) for callback in listed(trainer_config.get("callbacks")))
        return [] if named or trainer_config.get("enable_checkpointing") is False else [NewestCheckpoint()]

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with ending_children(self.trainer):
                super()._run_subcommand(subcommand)
        except (InputError, MisconfigurationException, KeyboardInterrupt):
            leave_no_trace(self.trainer, self._depth_of_folder)
            raise
        except SIGTERMException as error:
            raise ended_by_signal(self.trainer, self.signals.received or signal.SIGTERM) from error
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            leave_no_trace(self.trainer, self._depth_of_folder)
            raise TrainingStopped(self._explain_memory(error)) from error
        finally:
            self.trainer._signal_connector.teardown()  # Lightning leaves it out where a last save fails

    def _explain_memory(self, error: RuntimeError) -> str:
        c, resumed = self.collapse_settings, self._get(self.config_init, "ckpt_path") is not None
        given = resumed or c.plan is not None or c.remove is not None or c.strategy == "none"
        recipe = {"model": self.model_settings, "data": self.data_settings, "speed": self.speed_settings}
        searched = not given and c.placement != "stream"
        return self.memory.explain(error, self.trainer, {**recipe, "searched": searched})

    def before_fit(self) -> None:
        """Refuse a run whose export could not be written at its end; a run that goes on is tidied up first."""
        if self.earlier is not None:
            if self.trainer.is_global_zero:
                claim(self.earlier.folder).close()
                self.earlier.tidy()
            return
        if self.trainer.is_global_zero:
            take_folder(self.trainer, self._get(self.config_init, "ckpt_path"))
        if self.export_settings.enabled and self.trainer.log_dir:
            refuse_nonempty(self._export_to(), "export")

    def after_fit(self) -> None:
        """Export what was trained, and sum up."""
        if self.trainer.interrupted:
            return
        exports = self.export_settings.enabled and bool(self.trainer.log_dir)
        writes = bool(self.samples.prompts) and self.trainer.global_step > 0
        weights = gathered(self.model) if (exports or writes) and isinstance(self.model.lm, FSDPModule) else None
        part_ranks()
        if not self.trainer.is_global_zero:
            return
        model = self._whole_model(weights)
        if writes:  # Lightning has moved what is not sharded away from the device
            self._write_samples("trained", model.to("cpu" if weights else self.trainer.strategy.root_device))
        folder = self._export(model) if exports else None
        if self.trainer.log_dir:
            write_summary(self.collapse, self.curves, self.memory, self.tasks, self.samples, self.trainer)
        print_summary(self.collapse, self.curves, self.trainer, folder)

    def _export_to(self) -> Path:
        return Path(str(self.trainer.log_dir)) / "export"

    def _whole_model(self, gathered_weights: dict[str, Tensor] | None) -> nn.Module:
        """What was trained, put together again on the CPU if it was sharded."""
        if gathered_weights is None:
            return self.model.lm
        assert isinstance(self.collapse.plan, CollapsePlan)
        whole: nn.Module = rebuilt(self.model_settings, self.dtype, self.collapse.plan, gathered_weights)
        return whole

    def _export(self, model: nn.Module) -> Path:
        output = self._export_to()
        plan = self.collapse.plan
        assert isinstance(plan, CollapsePlan)
        whole = from_the_first_model(plan, self.model_settings.source)
        name = self.export_settings.dtype
        if isinstance(model, PeftModel) and not (output.parent / "adapter").exists():
            save_adapter(model, output.parent / "adapter")
        if output.exists():  # it appears whole or not at all, so the run was killed right after it
            return output
        dtype = self.dtype if name == "auto" else named_dtype(name)
        card, size = self._card(whole), self.export_settings.shard_size
        export_folder(model, self.load_tokenizer(), output, dtype=dtype, plan=whole, card=card, shard_size=size)
        return output

    def _card(self, plan: CollapsePlan) -> CardFacts:
        return CardFacts(
            base_model=plan.source if plan.rounds else self.model_settings.source,
            recipe=self.recipe,
            method=self.model_settings.method,
            data=told_of_run(self.datamodule.summary(), self.data_settings, self.model_settings),
            losses={**self.collapse.losses, "trained": self.curves.validation[-1][2]},
            tokens=self.curves.tokens - self.model.refined_tokens,
            steps=self.trainer.global_step,
            licence=None,
            from_scratch=self.model_settings.from_scratch,
            evaluations=of_run(self.tasks.found, self.trainer.global_step),
        )


def run(verb: str, args: list[str], cli: type[RecipeCLI] = RecipeCLI) -> None:
    """Run `verb` of the Trainer with command-line arguments `args`."""
    quieten()
    with rank_zero_speaks_first():
        arguments, recipe = resolve_arguments(args)
        try:
            cli([verb, *arguments], recipe)
        except MisconfigurationException as error:
            raise InputError("trainer", str(error).splitlines()[0]) from error
        except RunIsFinished as finished:
            rank_zero_only(print)(finished)
