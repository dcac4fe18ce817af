"""Grams of CO2 from joules, by the carbon intensity of a grid in CodeCarbon's offline data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from greenprune.config import EnergyConfig, UserError

if TYPE_CHECKING:
    from codecarbon.input import DataSource

CO2_IS_UNKNOWN = "CO2 is unknown: set energy.country to the country whose grid feeds this machine"
"""What a run that knows no carbon intensity notes of itself."""

_J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class CarbonIntensity:
    """How much carbon dioxide equivalent the making of electricity emits."""

    g_per_kwh: float
    """Grams of CO2 equivalent for each kilowatt-hour."""
    source: str
    """Where the figure comes from, with the version and the year of the data as far as they are told."""
    country: str | None
    """Three-letter ISO code; None where the intensity was given."""
    region: str | None
    """State, province or bidding zone; None for the whole country."""
    pue: float = 1.0
    """Power usage effectiveness of the site: energy it takes for each joule of its computers, cooling included."""


def carbon_intensity(
    country: str | None,
    region: str | None = None,
    *,
    g_per_kwh: float | None = None,
    pue: float = 1.0,
) -> CarbonIntensity | None:
    """The carbon intensity of a grid, given or from the data that CodeCarbon brings along; no network is used.

    Args:
        country: Three-letter ISO code in capitals; None if it is not known, for there is no default country.
        region: State, province or bidding zone, in any case; None for the whole country.
        g_per_kwh: The intensity itself, instead of a country.
        pue: Power usage effectiveness of the site; 1 counts the computers alone.

    Returns:
        The intensity; None without a country and an intensity.

    Raises:
        UserError: The intensity or the PUE is not valid, or CodeCarbon has no data for the country or region.
    """
    EnergyConfig(intensity_g_per_kwh=g_per_kwh, pue=pue)
    if g_per_kwh is not None:
        return CarbonIntensity(g_per_kwh, "given", None, None, pue)
    if country is None:
        return None
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    data = DataSource()
    countries = data.get_global_energy_mix_data()
    if country not in countries:
        names = {entry["country_name"].lower(): code for code, entry in countries.items()}
        close = [*difflib.get_close_matches(country, countries, n=3), *_names_like(country, names)]
        hint = f"did you mean {', '.join(dict.fromkeys(close))}? " if close else ""
        raise UserError(
            f"energy.country: {country!r} is not valid; {hint}expected one of the {len(countries)} "
            "three-letter ISO codes that CodeCarbon has data for, such as FRA, or null"
        )
    source = f"CodeCarbon {version('codecarbon')}, energy mix of {countries[country]['year']}"
    if region is not None:
        region = region.lower()
        _check_region(country, region, _regions(country, data))
        source = f"CodeCarbon {version('codecarbon')}, regional data"
    emitted_kg = Emissions(data).get_private_infra_emissions(
        Energy.from_energy(1.0), GeoMetadata(country, region=region)
    )
    return CarbonIntensity(emitted_kg * 1000, source, country, region, pue)


def co2_g(energy_j: float | None, intensity: CarbonIntensity | None) -> float | None:
    """Grams of CO2 equivalent for an amount of energy; None if the joules or the intensity are not known.

    Args:
        energy_j: Joules of the computers, as metered.
        intensity: Of the grid; its power usage effectiveness multiplies the joules.
    """
    if energy_j is None or intensity is None:
        return None
    return energy_j * intensity.pue / _J_PER_KWH * intensity.g_per_kwh


def _names_like(country: str, names: dict[str, str]) -> list[str]:
    """Codes of countries whose English name is like what was given."""
    return [names[name] for name in difflib.get_close_matches(country.lower(), names, n=2, cutoff=0.8)]


def _regions(country: str, data: DataSource) -> list[str]:
    """The regions of a country that CodeCarbon has data for, in lower case."""
    if country == "USA":
        states = data.get_country_emissions_data("usa")
        return sorted(name for name in states if name != "usa" and not name.startswith("_"))
    if country == "CAN":
        return sorted(data.get_country_energy_mix_data("can"))
    if country == "CHN":
        provinces = data.get_china_provincial_emissions_data()["data"].values()
        return sorted(name for province in provinces for name in province["names"])
    zone = {"SWE": "SE", "NOR": "NO", "FIN": "FI"}.get(country)
    zones = data.get_nordic_country_energy_mix_data()["data"] if zone is not None else {}
    return sorted(name.lower() for name in zones if name.startswith(str(zone)))


def _check_region(country: str, region: str, valid: list[str]) -> None:
    """CodeCarbon takes the country's figure for a region that it does not know; here that is an error."""
    if region in valid:
        return
    close = difflib.get_close_matches(region, valid, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    expected = f"one of {', '.join(valid)}, or null" if valid else f"null, for CodeCarbon has no regions of {country}"
    raise UserError(f"energy.region: {region!r} is not valid; {hint}expected {expected}")


def format_intensity(g_per_kwh: float) -> str:
    """A carbon intensity for people: ``56 g/kWh``; a low one to three digits, so that it is not shown as 0."""
    return f"{g_per_kwh:,.0f} g/kWh" if g_per_kwh >= 100 else f"{g_per_kwh:.3g} g/kWh"
