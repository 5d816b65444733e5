"""AppoCLI: YAML and command line to model, data and trainer."""

from __future__ import annotations

import argparse
import logging
import os
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from appo_lightning.callbacks import (
    AtomicCheckpointIO,
    BranchStatistics,
    CreditStatistics,
    EvaluationReport,
    ExportPolicy,
    FrozenHeap,
    GracefulStop,
    ProcedureAdvantageScaling,
    RandomState,
    RolloutProgressBar,
    RolloutStatistics,
    RolloutWriter,
    SamplerWeightSync,
    ToolCallEfficiency,
    Tripwires,
)
from appo_lightning.cli_parser import ShortErrorParser
from appo_lightning.datamodule import RolloutDataModule
from appo_lightning.errors import AppoError, ConfigurationError
from appo_lightning.module import AppoModule
from appo_lightning.policy_module import PolicyModule
from appo_lightning.registry import import_components

Stage = Literal["appo", "sft"]
COMMANDS = ("fit", "validate", "test", "predict")


class _SaveConfig(SaveConfigCallback):
    """Only a fit writes its config; an evaluation of the same run leaves it alone."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            # Folders that follow from output_dir: with another one, the same config must not write into this run's.
            self.config = self.config.clone()
            self.config.trainer.default_root_dir = None
            if self.config.checkpoint.dirpath == _checkpoint_folder(self.config.output_dir):
                self.config.checkpoint.dirpath = None
            super().setup(trainer, pl_module, stage)


class AppoCLI(LightningCLI):
    """One command for both stages; the stage decides which model and data classes the keys belong to."""

    def __init__(self, stage: Stage, command: str, args: list[str], *, execute: bool = True) -> None:
        self.stage = stage
        self._command, self._execute = command, execute
        import_components()
        super().__init__(
            *_stage_classes(stage),
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            parser_class=ShortErrorParser,
            seed_everything_default=42,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "max_epochs": -1,
                "callbacks": self._fixed_callbacks(),
            },
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            # `--model.optimizer.learning_rat 1` is a mistake, not an abbreviation.
            parser_kwargs={"allow_abbrev": False, command: {"allow_abbrev": False}},
            args=[command, *args],
        )

    def _fixed_callbacks(self) -> list[Any]:
        """Callbacks without options: no config can forget them."""
        common: list[Any] = [RandomState(), GracefulStop(), FrozenHeap()]
        if self.stage == "sft":
            return common
        return [*common, BranchStatistics(), CreditStatistics(), ToolCallEfficiency()]

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Each costs a parser of some 600 options: build the one that is asked for.
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--stage", type=Stage, default=self.stage, help="'appo': rollouts; 'sft': cold start on demonstrations."
        )
        parser.add_argument(
            "--output_dir",
            type=str,
            default=f"runs/{self.stage}",
            help="Checkpoints, TensorBoard files, reports and the config of the run go here.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Start anew in an output_dir that holds checkpoints."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.every_n_train_steps": 10,
                "checkpoint.save_top_k": 0,
                "checkpoint.enable_version_counter": False,
            }
        )
        parser.add_lightning_class_args(ExportPolicy, "export")
        if self.stage == "appo":
            parser.add_lightning_class_args(ProcedureAdvantageScaling, "advantage")
            parser.add_lightning_class_args(SamplerWeightSync, "sync")
            parser.add_lightning_class_args(RolloutStatistics, "rollout_statistics")
            parser.add_lightning_class_args(Tripwires, "tripwires")
            parser.add_lightning_class_args(EvaluationReport, "report")
            parser.add_lightning_class_args(RolloutWriter, "predictions")

    def before_instantiate_classes(self) -> None:
        config = self.config[self._command]
        output = config.output_dir
        if not output:
            raise ConfigurationError("output_dir is empty: name a directory")
        if config.trainer.default_root_dir not in (None, output):
            raise ConfigurationError("trainer.default_root_dir has no effect here: set output_dir")
        config.trainer.default_root_dir = output
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = _checkpoint_folder(output)
        _check_trainer(config.trainer)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except AppoError:
            raise
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            # A component that refuses its options, in whatever words its library has for it.
            raise ConfigurationError(" ".join(str(error).split())) from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise ConfigurationError(f"seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Lightning would read the whole checkpoint for hyper-parameters, of which ours hold none."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # Lightning's own warns when a command line exists as well, which is where ours come from.
        self.config = parser.parse_args(args)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self._get(self.config_init, "trainer")
        if config.logger in (None, True):
            # A fixed folder: a resumed run goes on in the same files.
            kwargs["logger"] = TensorBoardLogger(config.default_root_dir, name="", version="", default_hp_metric=False)
        if config.enable_progress_bar is not False:
            config.callbacks = [*(config.callbacks or []), RolloutProgressBar()]
        plugins = config.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if self._execute:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        config = self.config["fit"]
        self._resolve_checkpoint()
        if config.ckpt_path is None and _last_checkpoint(config).exists():
            if not config.overwrite:
                raise ConfigurationError(
                    f"{config.output_dir} holds checkpoints of an earlier run: continue it with --ckpt_path last, "
                    "start anew with --overwrite true, or choose another --output_dir"
                )
            _remove_run(Path(config.output_dir), Path(config.checkpoint.dirpath))

    def before_validate(self) -> None:
        self._resolve_checkpoint()

    def before_test(self) -> None:
        self._resolve_checkpoint()

    def before_predict(self) -> None:
        self._resolve_checkpoint()

    def _resolve_checkpoint(self) -> None:
        config = self.config[self._command]
        if config.ckpt_path == "last":
            last = _last_checkpoint(config)
            if not last.exists():
                raise ConfigurationError(
                    f"--ckpt_path last: expected {last}, found none; check output_dir, or start without --ckpt_path"
                )
            config.ckpt_path = str(last)
        if config.ckpt_path is not None:
            check_checkpoint(Path(config.ckpt_path))


def _checkpoint_folder(output_dir: str) -> str:
    return os.path.join(output_dir, "checkpoints")


def _last_checkpoint(config: Any) -> Path:
    return Path(config.checkpoint.dirpath) / "last.ckpt"


def check_checkpoint(path: Path) -> None:
    """Refuse what cannot be a checkpoint, before minutes of building go by.

    Raises:
        ConfigurationError: nothing is there, or a file that torch.save did not write, or not to its end.
    """
    if not path.exists():
        raise ConfigurationError(f"--ckpt_path: expected a checkpoint file, found no {path}")
    # A directory is a sharded checkpoint.
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ConfigurationError(f"--ckpt_path: {path} is no checkpoint, or a torn one")


def _check_trainer(trainer: Any) -> None:
    if str(trainer.precision) in ("bf16-true", "16-true", "bf16", "16"):
        raise ConfigurationError(
            f"trainer.precision = {trainer.precision} would round log-probs and advantages too; use bf16-mixed, or "
            "model.policy.dtype: bfloat16 with trainer.precision: 32-true"
        )
    if trainer.val_check_interval is not None and not _is_positive(trainer.val_check_interval):
        raise ConfigurationError(
            f"trainer.val_check_interval must be positive, got {trainer.val_check_interval}; to switch validation off "
            "set trainer.limit_val_batches: 0"
        )
    strategy = str(getattr(trainer.strategy, "class_path", trainer.strategy))
    if strategy.startswith("fsdp") or strategy.endswith(".FSDPStrategy"):
        raise ConfigurationError(
            f"trainer.strategy = {strategy}: the policy is sharded by FSDP2, not by the first FSDP; "
            "use --config configs/trainer/fsdp.yaml (GPUs) or fsdp2.yaml (CPU)"
        )


def _is_positive(interval: Any) -> bool:
    return not isinstance(interval, int | float) or interval > 0


def _stage_classes(stage: Stage) -> tuple[type[L.LightningModule], type[L.LightningDataModule]]:
    if stage == "appo":
        return AppoModule, RolloutDataModule
    from appo_lightning.sft import DemonstrationDataModule, SFTModule

    return SFTModule, DemonstrationDataModule


def _remove_run(output: Path, checkpoints: Path) -> None:
    """Remove what an earlier run of ours wrote, and nothing else."""
    if not torch.distributed.is_initialized() and int(os.environ.get("LOCAL_RANK", "0")) != 0:
        return
    for pattern in (
        "events.out.tfevents.*",
        "hparams.yaml",
        "config.yaml",
        "validation*.*",
        "failed_step_*.jsonl",
        "tripwires*.jsonl",
    ):
        for path in output.glob(pattern):
            path.unlink()
    for path in checkpoints.glob("*.ckpt"):
        path.unlink(missing_ok=True)


def find_stage(arguments: list[str]) -> Stage:
    """The stage that the configs and the command line ask for, before any parser exists.

    Raises:
        ConfigurationError: it is neither "appo" nor "sft", or a config file cannot be read.
    """
    stage: Any = "appo"
    for flag, value in zip(arguments, [*arguments, ""][1:], strict=True):
        name, equals, inline = flag.partition("=")
        value = inline if equals else value
        if name in ("--config", "-c"):
            path = Path(value)
            if not path.is_file():
                raise ConfigurationError(f"--config: expected a YAML file, found no {value!r}")
            try:
                content = yaml.safe_load(path.read_text())
            except yaml.YAMLError as error:
                raise ConfigurationError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
            if isinstance(content, dict):
                stage = content.get("stage", stage)
        elif name == "--stage":
            stage = value
    if stage not in ("appo", "sft"):
        raise ConfigurationError(f"stage must be 'appo' or 'sft', got {stage!r}")
    return stage


def run(command: str, arguments: list[str]) -> int:
    """``appo fit|validate|test|predict``."""
    if command not in COMMANDS:
        raise ConfigurationError(f"expected one of {', '.join(COMMANDS)}, export, create-tiny, got {command!r}")
    stage = find_stage(arguments)
    if stage == "sft" and command != "fit":
        raise ConfigurationError(
            f"stage 'sft' knows fit only, got {command!r}; evaluate its export with an appo config"
        )
    _quieten_libraries()
    cli: AppoCLI | None = None
    try:
        cli = AppoCLI(stage, command, arguments)
    except (MisconfigurationException, ValueError) as error:
        # What Lightning itself refuses is about the trainer's options.
        if isinstance(error, AppoError) or not _is_raised_by_lightning(error):
            raise
        raise ConfigurationError(" ".join(str(error).split())) from error
    finally:
        _close(cli)
    stopped = [callback.received for callback in cli.trainer.callbacks if isinstance(callback, GracefulStop)]  # type: ignore[attr-defined]
    return 128 + stopped[0] if stopped and stopped[0] else 0


def _is_raised_by_lightning(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__")).startswith("lightning.")


def _quieten_libraries() -> None:
    """Drop advertisements and hints that do not apply to us; other warnings stay."""
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it is for GPUs
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(("💡", "TPU available")))
    # The policy is built in evaluation mode by transformers; dropout is no part of it.
    warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start of training.*")
    # Checkpoints hold the weights after the step, which is what a resumed run needs.
    warnings.filterwarnings("ignore", message=r"Using ModelCheckpoint with manual optimization[\s\S]*")
    warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec.*")


def _close(cli: AppoCLI | None) -> None:
    data = getattr(cli, "datamodule", None)
    if data is not None:
        data.close()


def run_export(arguments: list[str]) -> int:
    """``appo export``: a Lightning checkpoint to a transformers or PEFT directory."""
    parser = argparse.ArgumentParser(prog="appo export", description=run_export.__doc__)
    parser.add_argument("--config", required=True, help="the config that the policy was trained with")
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of the run")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--adapters", action="store_true", help="LoRA: write the adapters alone, for PEFT")
    options = parser.parse_args(arguments)
    path = Path(options.ckpt_path)
    if path.is_dir():
        raise ConfigurationError(f"--ckpt_path: expected a checkpoint file, found the directory {path}")
    check_checkpoint(path)
    source = ["--config", options.config]
    cli = AppoCLI(find_stage(source), "fit", source, execute=False)
    module = cli.model
    assert isinstance(module, PolicyModule)
    _quieten_libraries()
    if options.adapters and module.policy_options.lora is None:
        raise ConfigurationError("--adapters: this policy was trained without LoRA; leave the flag out")
    module.configure_model()
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    module.export(options.output, merge=not options.adapters)
    print(f"policy of {path} written to {options.output}")
    return 0
