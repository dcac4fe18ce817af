"""The options of commands that tell CO2: which grid feeds the machines, and the site's overhead."""

from __future__ import annotations

import argparse

from greenprune.config import EnergyConfig, UserError, told_by_flags
from greenprune.energy.carbon import CarbonIntensity, carbon_intensity

# The options by the fields of a run's config whose rules they follow.
_FLAGS = {
    "country": "--country",
    "region": "--region",
    "intensity_g_per_kwh": "--intensity",
    "interval_s": "--interval",
    "pue": "--pue",
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
        UserError: An option is not valid, or a PUE stands alone.
    """
    try:
        valid = EnergyConfig(options.country, options.region, options.intensity, options.pue)
        carbon = carbon_intensity(valid.country, valid.region, g_per_kwh=valid.intensity_g_per_kwh, pue=valid.pue)
    except UserError as error:
        raise by_options(error) from None
    if carbon is None and valid.pue != 1:
        raise UserError(f"--pue: {valid.pue} changes nothing alone; expected --country or --intensity beside it")
    return carbon


def by_options(error: UserError) -> UserError:
    """An error about the energy of a run's config as one about the options of the same meaning."""
    return told_by_flags(error, "energy", **_FLAGS)
