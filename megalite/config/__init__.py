"""The run file: its schema, its loading, and the rules between its fields."""

from __future__ import annotations

from megalite.config.deepspeed_keys import zero_stage
from megalite.config.faults import describe_errors
from megalite.config.finetune import AdapterConfig, ExamplesConfig, FinetuneConfig
from megalite.config.load import (
    ConfigSource,
    find_file,
    find_run,
    lacks_model,
    load_config,
    load_stored,
    merged,
    parse_config,
    run_files,
    section_changes,
    source_name,
    stated_model,
)
from megalite.config.logging import LoggingConfig, SamplesConfig, WandbConfig
from megalite.config.model import LayerType, ModelConfig, RopeScalingConfig, example_model
from megalite.config.objective import (
    source_length,
    spans,
    target_count,
    target_fraction,
    target_length,
)
from megalite.config.precision import Precision
from megalite.config.renamed import rename_keys
from megalite.config.rules import allowed_tensor_sizes
from megalite.config.schema import (
    CheckpointConfig,
    DataConfig,
    GuardsConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainingConfig,
)
from megalite.config.secrets import explain_redacted, redacted_keys, restore_redacted
from megalite.config.strict import read_strict_object, write_value

__all__ = [
    "AdapterConfig",
    "CheckpointConfig",
    "ConfigSource",
    "DataConfig",
    "ExamplesConfig",
    "FinetuneConfig",
    "GuardsConfig",
    "LayerType",
    "LoggingConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Precision",
    "RopeScalingConfig",
    "RunConfig",
    "SamplesConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainingConfig",
    "WandbConfig",
    "allowed_tensor_sizes",
    "describe_errors",
    "example_model",
    "explain_redacted",
    "find_file",
    "find_run",
    "lacks_model",
    "load_config",
    "load_stored",
    "merged",
    "parse_config",
    "read_strict_object",
    "redacted_keys",
    "rename_keys",
    "restore_redacted",
    "run_files",
    "section_changes",
    "source_length",
    "source_name",
    "spans",
    "stated_model",
    "target_count",
    "target_fraction",
    "target_length",
    "write_value",
    "zero_stage",
]
