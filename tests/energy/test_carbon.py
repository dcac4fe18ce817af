"""Carbon intensity, out of the data that comes with CodeCarbon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from greenprune.config import UserError
from greenprune.energy import carbon_intensity, co2_g, format_intensity


@pytest.mark.parametrize(
    ("country", "region", "g_per_kwh"),
    [
        ("FRA", None, 56.039),
        ("USA", None, 369.473),
        ("USA", "california", 179.064),
        ("USA", "California", 179.064),
        ("CAN", "quebec", 3.937),
        ("CHN", "beijing", 555.4),
        ("SWE", "SE3", 27.0),
    ],
)
def test_intensities_are_codecarbons(country: str, region: str | None, g_per_kwh: float) -> None:
    intensity = carbon_intensity(country, region)
    assert intensity is not None
    assert intensity.g_per_kwh == pytest.approx(g_per_kwh, rel=0.3)  # The data is updated with CodeCarbon.
    assert intensity.country == country
    assert intensity.source.startswith("CodeCarbon ")


def test_the_unit_is_grams_for_a_kilowatt_hour() -> None:
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    intensity = carbon_intensity("USA", "texas")
    assert intensity is not None
    place = GeoMetadata("USA", region="texas")
    expected_g = 1000 * Emissions(DataSource()).get_private_infra_emissions(Energy.from_energy(2.5), place)
    assert co2_g(2.5 * 3.6e6, intensity) == pytest.approx(expected_g)
    assert 0.25 * expected_g < 2.5 * 1000  # A grid emits less than 1 kg for each kWh, and more than nothing.
    assert expected_g > 0


@pytest.mark.parametrize(
    ("g_per_kwh", "told"),
    [(0.0, "0 g/kWh"), (0.4, "0.4 g/kWh"), (3.937, "3.94 g/kWh"), (56.039, "56 g/kWh"), (1234.5, "1,234 g/kWh")],
)
def test_a_low_intensity_is_not_told_as_none(g_per_kwh: float, told: str) -> None:
    assert format_intensity(g_per_kwh) == told


def test_there_is_no_default_country_and_unknown_stays_unknown() -> None:
    assert carbon_intensity(None) is None
    assert co2_g(100.0, None) is None
    assert co2_g(None, carbon_intensity("FRA")) is None


def test_a_given_intensity_needs_no_country_and_says_that_it_was_given() -> None:
    intensity = carbon_intensity(None, g_per_kwh=123.0)
    assert intensity is not None
    assert (intensity.g_per_kwh, intensity.source, intensity.country, intensity.pue) == (123.0, "given", None, 1.0)
    assert co2_g(3.6e6, intensity) == pytest.approx(123)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"country": "FRA", "pue": 0.5}, "energy.pue: 0.5 is not valid; expected a number of at least 1"),
        ({"country": "FRA", "pue": float("nan")}, "energy.pue: nan is not valid"),
        ({"country": None, "g_per_kwh": -1.0}, "energy.intensity_g_per_kwh: -1.0 is not valid"),
        ({"country": None, "g_per_kwh": "50"}, "energy.intensity_g_per_kwh: '50' is not valid; expected a number"),
    ],
)
def test_an_intensity_asked_for_in_python_follows_the_rules_of_a_config(values: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        carbon_intensity(**values)


def test_the_sites_overhead_multiplies_the_joules() -> None:
    plain, site = carbon_intensity("FRA"), carbon_intensity("FRA", pue=1.4)
    assert plain is not None
    assert site is not None
    assert (site.pue, site.g_per_kwh) == (1.4, plain.g_per_kwh)
    assert co2_g(1000, site) == pytest.approx(1.4 * (co2_g(1000, plain) or 0))


def test_every_country_that_is_offered_has_a_figure() -> None:
    from codecarbon.input import DataSource

    for country in DataSource().get_global_energy_mix_data():
        intensity = carbon_intensity(country)
        assert intensity is not None
        assert intensity.g_per_kwh >= 0


@pytest.mark.parametrize(
    ("country", "region", "parts"),
    [
        ("FRE", None, ["energy.country", "'FRE'", "did you mean", "FRA", "or null"]),
        ("GERMANY", None, ["energy.country", "'GERMANY'", "did you mean DEU"]),
        ("XXX", None, ["energy.country", "'XXX'", "three-letter ISO"]),
        ("USA", "texs", ["energy.region", "'texs'", "did you mean texas", "wyoming"]),
        ("USA", "_unit", ["energy.region", "'_unit'"]),
        ("SWE", "no1", ["energy.region", "se1, se2, se3, se4"]),
        ("CHN", "tibet", ["energy.region", "'tibet'"]),
        ("FRA", "bretagne", ["energy.region", "'bretagne'", "no regions of FRA"]),
    ],
)
def test_an_unknown_place_is_the_users_error(country: str, region: str | None, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        carbon_intensity(country, region)
    for part in parts:
        assert part in str(caught.value)


def test_no_network_is_used(run_python: Callable[[str, dict[str, str]], Any]) -> None:
    code = """
import socket
def no_network(*args, **options):
    raise AssertionError("network used")
socket.socket.connect = socket.getaddrinfo = no_network
from greenprune.energy import carbon_intensity
result = carbon_intensity("DEU").g_per_kwh
"""
    assert run_python(code, {}) > 0
