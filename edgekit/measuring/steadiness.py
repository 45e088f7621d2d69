"""Steadiness of a measurement: notes on a processor that slows down or is not steady, told by its times."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from edgekit.errors import EdgeKitError
from edgekit.measuring import outliers
from edgekit.measuring.latency import Latency

if TYPE_CHECKING:
    from edgekit.runtimes.devices.device import Device

HOT_C = 60.0  # a sensor below says nothing of throttling


def notes(latencies: Mapping[str, Latency | None], device: Device) -> tuple[str, ...]:
    """Returns a note for what became slower while it ran on `device`, with what the device tells of the reason."""
    slower = {name: latency.slowdown for name, latency in latencies.items() if latency and latency.slowdown}
    if not slower:
        return ()
    facts: Mapping[str, Any] = {}
    with suppress(EdgeKitError):
        facts = device.probe()
    worst, ratio = max(slower.items(), key=lambda item: item[1])
    others = f", and {len(slower) - 1} more slowed down too" if len(slower) > 1 else ""
    return (
        f"{worst} became slower by {100 * (ratio - 1):.0f} % while it was measured{others}: a throttled or a busy "
        f"processor{_state(facts)}; let it cool down and measure again",
    )


def unsteady(latency: Latency | None) -> tuple[str, ...]:
    """Returns notes where a p50 leaves out disturbed runs, and where it is not known well (see `outliers`)."""
    found = []
    if latency is not None and latency.disturbed > outliers.QUIET:
        found.append(
            f"the p50 leaves out {100 * latency.disturbed:.0f} % of the runs, which others slowed down: they took more "
            f"than {100 * outliers.NEAR:.0f} % longer than the fastest stretches; p90 and p99 are of all runs, whose "
            f"median is {latency.percentile(50):.3g} ms"
        )
    if latency is not None and latency.margin is not None and latency.margin > outliers.MARGIN:
        low, high = min(latency.medians), max(latency.medians)
        found.append(
            f"the p50 may be off by {100 * latency.margin:.0f} %: the medians of {len(latency.medians)} processes lie "
            f"between {low:.3g} and {high:.3g} ms; measure on an idle machine"
        )
    return tuple(found)


def _state(facts: Mapping[str, Any]) -> str:
    """Returns the slowest clock and the hottest sensor that a device tells of, in brackets."""
    said = []
    now, most = facts.get("khz", ()), facts.get("max_khz", ())
    if now and len(now) == len(most):
        slow, full = min(zip(now, most, strict=True), key=lambda pair: pair[0] / pair[1])
        said.append(f"a core at {slow / 1e6:.1f} of {full / 1e6:.1f} GHz now")
    heat = facts.get("temperatures_c") or {}
    name = max(heat, key=lambda sensor: heat[sensor], default=None)
    if name is not None and heat[name] >= HOT_C:
        said.append(f"{name} at {heat[name]:.0f} °C")
    return f" ({', '.join(said)})" if said else ""
