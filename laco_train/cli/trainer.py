"""`fit` and `validate`, on LightningCLI: every Trainer option works, and the recipe's sections are our dataclasses."""

from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.tensorboard.summary import hparams

from laco_train.callbacks.curves import Curves
from laco_train.callbacks.divergence import StopOnNonFiniteLoss
from laco_train.callbacks.duration import EstimateDuration
from laco_train.callbacks.layer_collapse import LayerCollapse
from laco_train.callbacks.progress import RunProgressBar
from laco_train.cli.parsing import OneLineErrors, add_recipe_flag, resolve_arguments
from laco_train.cli.quiet import quieten
from laco_train.cli.summary import print_summary, write_summary
from laco_train.collapse import CollapsePlan
from laco_train.collapse.families import depth_of
from laco_train.collapse.similarity import read_calibration
from laco_train.errors import InputError
from laco_train.export import CardFacts, export_folder, refuse_nonempty, save_adapter
from laco_train.models import load_config, load_tokenizer
from laco_train.precision import named_dtype, weights_dtype
from laco_train.settings import (
    BudgetSettings,
    CollapseSettings,
    DataSettings,
    ExportSettings,
    ModelSettings,
    SpeedSettings,
    check_budget,
    check_collapse,
    check_data,
    check_model,
)
from laco_train.training.checkpoint import read_checkpoint
from laco_train.training.data import PackedText
from laco_train.training.module import CausalLM

_SECTIONS = {
    "model": ModelSettings,
    "collapse": CollapseSettings,
    "data": DataSettings,
    "budget": BudgetSettings,
    "speed": SpeedSettings,
    "export": ExportSettings,
}
CONFIG_FILE = "config.yaml"
"""In a run's folder: the whole recipe as it ran; there once the run has begun."""
_TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,  # the loss right after the collapse is measured anyway
    "use_distributed_sampler": False,  # PackedText deals out its batches itself; the injected sampler isn't exact
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the collapse prints what it left
}


class RecipeParser(OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser with one-line errors."""


class RecordConfig(SaveConfigCallback):
    """Saves config.yaml once the run is sure to begin, so that input found bad until then leaves no trace."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: the collapse may still refuse its input."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Model, data and collapse are ready: save the recipe, and show it in TensorBoard too."""
        log_dir = trainer.log_dir  # asks all processes
        if log_dir is None or not trainer.is_global_zero:
            return
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        (Path(log_dir) / CONFIG_FILE).write_text(self.parser.dump(self.config, skip_unset=False), encoding="utf-8")
        leaves = [(f"{name}.{key}", value) for name in _SECTIONS for key, value in self.config[name].items()]
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in leaves}
        if trainer.logger is not None:
            trainer.logger.log_hyperparams(values)
        if isinstance(trainer.logger, TensorBoardLogger):  # which shows them beside a result only
            for summary in hparams(values, {"val/loss": 0}):
                trainer.logger.experiment._get_file_writer().add_summary(summary)


class RecipeCLI(LightningCLI):
    """LightningCLI whose sections are laco_train.settings."""

    def __init__(self, args: list[str], recipe: str | None):
        self.recipe = recipe or "run"
        super().__init__(
            trainer_defaults=_TRAINER_DEFAULTS,
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

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our sections, and the Trainer's."""
        for name, settings in _SECTIONS.items():
            parser.add_class_arguments(settings, name)
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in _TRAINER_DEFAULTS.items()})

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
        self.budget_settings: BudgetSettings = self._get(self.config_init, "budget")
        self.speed_settings: SpeedSettings = self._get(self.config_init, "speed")
        check_budget(self.budget_settings)
        s = self.model_settings
        precision = str(self._get(self.config_init, "trainer").get("precision") or "32-true")
        self.dtype = weights_dtype(s.dtype, precision)
        self.load_tokenizer = partial(load_tokenizer, s.source, trust_remote_code=s.trust_remote_code)
        self.model = CausalLM(s, self.dtype, self.speed_settings, self.budget_settings)
        self.datamodule = PackedText(self.data_settings, self.load_tokenizer)
        self.collapse = self._collapse_callback()
        self.curves = Curves(self.collapse)
        self.trainer = self.instantiate_trainer()
        self._say_device()
        self._check_against_model()

    def _check_against_model(self) -> None:
        s = self.model_settings
        config = load_config(s.source, trust_remote_code=s.trust_remote_code)
        check_data(self.data_settings, getattr(config, "max_position_embeddings", None))
        if self.collapse.plan is not None:
            return
        check_collapse(self.collapse_settings, depth_of(config))
        if self.collapse_settings.plan is None and self.collapse_settings.remove is None:
            read_calibration(self.collapse_settings.calibration)

    def _collapse_callback(self) -> LayerCollapse:
        path = self._get(self.config_init, "ckpt_path")
        if path is None:
            return LayerCollapse(self.collapse_settings, self.recipe)
        checkpoint = read_checkpoint(Path(path), "--ckpt_path")
        losses = {name: value for name, value in checkpoint.losses.items() if name != "trained"}
        return LayerCollapse(self.collapse_settings, self.recipe, checkpoint.plan, losses)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer with our callbacks, logging to lightning_logs/<recipe>/version_N unless told otherwise."""
        trainer_config = {**self._get(self.config_init, "trainer"), **kwargs}
        if trainer_config.get("logger") in (None, True):
            root = trainer_config.get("default_root_dir") or "."
            logger = TensorBoardLogger(Path(root) / "lightning_logs", name=self.recipe, default_hp_metric=False)
            trainer_config["logger"] = logger
        callbacks = [self.collapse, self.curves, StopOnNonFiniteLoss(), EstimateDuration(self.data_settings)]
        if trainer_config.get("enable_progress_bar") is not False:
            callbacks.append(RunProgressBar())
        try:
            return self._instantiate_trainer(trainer_config, callbacks)
        except ValueError as error:  # an accelerator or strategy of no such name
            raise InputError("trainer", str(error).splitlines()[0]) from error

    def _say_device(self) -> None:
        if isinstance(self.trainer.accelerator, CPUAccelerator):
            import torch

            print(f"No GPU is used: this run is on the CPU ({torch.get_num_threads()} threads).", flush=True)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (InputError, MisconfigurationException):
            self._leave_no_trace()
            raise

    def _leave_no_trace(self) -> None:
        """Remove the folder of a run that never began: Lightning opens the event file before the model is there."""
        folder = Path(str(self.trainer.log_dir))
        if not isinstance(self.trainer.logger, TensorBoardLogger) or (folder / CONFIG_FILE).exists():
            return
        self.trainer.logger.finalize("failed")
        for events in folder.glob("events.*"):
            events.unlink()
        for empty in (folder, folder.parent, folder.parent.parent):
            if not empty.is_dir() or any(empty.iterdir()):
                return
            empty.rmdir()

    def before_fit(self) -> None:
        """Refuse a run whose export could not be written at its end."""
        if self.export_settings.enabled and self.trainer.log_dir:
            refuse_nonempty(self._export_to(), "export")

    def after_fit(self) -> None:
        """Export what was trained, and sum up."""
        if self.trainer.interrupted or not self.trainer.is_global_zero:
            return
        folder = self._export() if self.export_settings.enabled and self.trainer.log_dir else None
        if self.trainer.log_dir:
            write_summary(self.collapse, self.curves, self.trainer)
        print_summary(self.collapse, self.curves, self.trainer, folder)

    def _export_to(self) -> Path:
        return Path(str(self.trainer.log_dir)) / "export"

    def _export(self) -> Path:
        output = self._export_to()
        plan = self.collapse.plan
        assert isinstance(plan, CollapsePlan)
        name = self.export_settings.dtype
        if self.model_settings.method == "lora":
            save_adapter(self.model.lm, output.parent / "adapter")
        card = CardFacts(
            base_model=self.model_settings.source,
            recipe=self.recipe,
            method=self.model_settings.method,
            data=self.datamodule.summary(),
            losses={**self.collapse.losses, "trained": self.curves.validation[-1][2]},
            tokens=self.curves.tokens,
            steps=self.trainer.global_step,
            licence=None,
        )
        dtype = self.dtype if name == "auto" else named_dtype(name)
        export_folder(self.model.lm, self.load_tokenizer(), output, dtype=dtype, plan=plan, card=card)
        return output


def run(verb: str, args: list[str]) -> None:
    """Run `verb` of the Trainer with command-line arguments `args`."""
    quieten()
    arguments, recipe = resolve_arguments(args)
    try:
        RecipeCLI([verb, *arguments], recipe)
    except MisconfigurationException as error:
        raise InputError("trainer", str(error).splitlines()[0]) from error
