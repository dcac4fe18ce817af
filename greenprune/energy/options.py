"""The options of commands that tell CO2: which grid feeds the machines, and the site's overhead."""

from __future__ import annotations

import argparse

from greenprune.config import EnergyConfig, UserError
from greenprune.energy.carbon import CarbonIntensity, carbon_intensity

# The options under the names that they have in a run's config, whose rules they follow.
_FLAGS = {
    "energy.country": "--country",
    "energy.region": "--region",
    "energy.intensity_g_per_kwh": "--intensity",
    "energy.interval_s": "--interval",
    "energy.pue": "--pue",
}


def add_carbon_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Give a parser the options that :func:`carbon_of` reads."""
    parser.add_argument(
        "--country", metavar="ISO", help="three-letter code of the country whose grid feeds the machine"
    )
    parser.add_argument("--region", help="state or province, where CodeCarbon knows it")
    parser.add_argument("--intensity", type=float, metavar="G", help="the grid's gCO2e/kWh, instead of a country")
    parser.add_argument("--pue", type=float, default=1.0, help="power usage effectiveness of the site (default: 1)")


def carbon_of(options: argparse.Namespace) -> CarbonIntensity | None:
    """The intensity that options tell, under the rules of a run's config; None if they tell none.

    Raises:
        UserError: An option is not valid.
    """
    try:
        valid = EnergyConfig(options.country, options.region, options.intensity, options.pue)
        return carbon_intensity(valid.country, valid.region, g_per_kwh=valid.intensity_g_per_kwh, pue=valid.pue)
    except UserError as error:
        raise UserError(as_options(str(error))) from None


def as_options(message: str) -> str:
    """A message about keys of a run's config as one about the options of the same meaning."""
    for key, flag in _FLAGS.items():
        message = message.replace(key, flag)
    return message
