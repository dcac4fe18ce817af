"""The configuration of one run: frozen dataclasses, their validation, and the way from YAML and flags to them.

One YAML file is one complete run. Every field can be set on the command line by its dotted name
(``--optim.lr 0.2``), where the last word wins. What is wrong is reported as a :class:`ConfigError` with one
message that names the key, the value and what is valid, before any file is written.
"""

from greenprune.config.checked import ConfigError, UserError, told_by_flags
from greenprune.config.fields import (
    MAY_CHANGE,
    BudgetConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EnergyConfig,
    GateConfig,
    ModelConfig,
    OptimConfig,
    RemovalConfig,
    SurgeryConfig,
    TrackingConfig,
    check_budget_unit,
    check_deadline,
    shaping_values,
)
from greenprune.config.parsing import (
    FIELDS,
    check_field,
    config_parser,
    declared_type,
    dump_config,
    load_config,
    load_yaml,
    parse_config,
    plain_message,
)

__all__ = [
    "FIELDS",
    "MAY_CHANGE",
    "BudgetConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EnergyConfig",
    "GateConfig",
    "ModelConfig",
    "OptimConfig",
    "RemovalConfig",
    "SurgeryConfig",
    "TrackingConfig",
    "UserError",
    "check_budget_unit",
    "check_deadline",
    "check_field",
    "config_parser",
    "declared_type",
    "dump_config",
    "load_config",
    "load_yaml",
    "parse_config",
    "plain_message",
    "shaping_values",
    "told_by_flags",
]
