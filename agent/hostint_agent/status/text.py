# SPDX-License-Identifier: Apache-2.0
"""Pure: what `status` has gathered, as text for a person, at most 100 columns wide."""

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address

from hostint_agent import bpf_calls
from hostint_agent.status import hook_orders, look, tallies
from hostint_agent.status.page import LABEL, Cell, Page, cut

_US = "hostint"
_MOST_COLLECTOR = 16
# counters that have a column; those of losses are told at the end, and what is left in words if there is any
_COLUMNS = {
    "watched": "WATCHED",
    "reported": "REPORTED",
    "suppressed": "NO NEWS",
    "dropped": "DROPPED",
    "drops_reported": "DROP REPORTS",
}
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_SIZES = ((10**15, "P"), (10**12, "T"), (10**9, "G"))


def render(told: look.Status, *, colours: bool) -> str:
    """The whole page."""
    page = Page(colours)
    _node(page, told)
    _programs(page, told)
    _attached(page, told)
    _watched(page, told)
    _collectors(page, told)
    _filled(page, told)
    _lost(page, told)
    return "\n".join(page.lines)


def _node(page: Page, told: look.Status) -> None:
    page.field("NODE", f"{told.node}, node id {IPv4Address(told.node_id)}")
    if told.agent_running:
        pid = f", pid {told.agent_pid}" if told.agent_pid else ""
        page.field("AGENT", f"running{pid}", "green")
    else:
        words = "not running: packets are still watched, and reports wait in the rings for an agent"
        page.field("AGENT", words, "yellow")
    of = f" of hostint {told.version}" if told.build == told.sources_build else ""
    loaded = f"loaded {_age(told.loaded_s)} ago"
    page.field("DATAPATH", f"build {told.build}{of}, {loaded}, in {told.pin_dir}")
    for words in _doubts(told):
        page.field("", words, "yellow")


def _doubts(told: look.Status) -> Iterator[str]:
    if not told.enabled:
        yield "not enabled: no packet is looked at; an agent enables it when it starts"
    if told.holding:
        yield "reports are held back until an upgrade is complete; if none goes on, restart the agent"
    if told.sources_build not in (None, told.build):
        yield f"hostint {told.version} is build {told.sources_build}: an agent of it that starts will load that"


def _programs(page: Page, told: look.Status) -> None:
    page.gap()
    header = ["PROGRAM", "KERNEL ID", "VERIFIED INSTRUCTIONS", "RUNS MISSED", "RUNS", "TIME A RUN"]
    if not any(one.runs for one in told.programs.values()):
        # the kernel counts them only when asked to
        header = header[:4]
    rows = [_program(name, one)[: len(header)] for name, one in told.programs.items()]
    page.table(header, rows, left=1)


def _program(name: str, one: bpf_calls.ProgramInfo) -> list[str | Cell]:
    return [
        name,
        str(one.id),
        _count(one.verified_instructions),
        _bad(one.recursion_misses),
        _count(one.runs),
        f"{one.run_time_ns / one.runs:,.0f} ns" if one.runs else "-",
    ]


def _attached(page: Page, told: look.Status) -> None:
    page.gap()
    if not told.own_namespace:
        words = (
            "not to be seen from here: the datapath is of another network namespace "
            "than this command (in Kubernetes: that of the node)"
        )
        page.field("ATTACHED", words, "yellow")
        return
    hooks = [hook for interface in told.interfaces for hook in interface.hooks]
    first = sum(hook.place == 1 for hook in hooks)
    words = f"first in order on {first} of {len(hooks)} hooks of {len(told.interfaces)} interfaces"
    page.field("ATTACHED", words, "" if first == len(hooks) and hooks else "yellow")
    for words in told.unseen:
        page.field("", words, "yellow")
    for (kind, orders), names in _alike(told.interfaces).items():
        page.field(f"  {kind}", " ".join(names))
        for hook in orders:
            _hook(page, hook)


def _alike(
    found: Iterable[hook_orders.Interface],
) -> dict[tuple[str, tuple[hook_orders.Hook, ...]], list[str]]:
    """Names of interfaces by kind and hooks: on a node with hundreds of pods most are alike."""
    alike: dict[tuple[str, tuple[hook_orders.Hook, ...]], list[str]] = {}
    for interface in sorted(found, key=lambda one: one.kind != "uplink"):
        alike.setdefault((interface.kind, interface.hooks), []).append(interface.name)
    return alike


def _hook(page: Page, hook: hook_orders.Hook) -> None:
    everybody = (*hook.before, *([_US] if hook.method else []), *hook.after)
    if hook.method:
        colour = "green" if hook.place == 1 else "yellow"
        where = f"{hook.method:<6}  {hook.place} of {len(everybody)}"
    else:
        colour, where = "red", "not attached"
    direction = f"{' ' * LABEL}{hook.direction:<9}"
    page.beside([("", direction), (colour, f"{where:<16}")], " > ".join(everybody))


def _watched(page: Page, told: look.Status) -> None:
    page.gap()
    words = f"{_count(told.rules)} directed ({told.own_rules} more of our own), generation {told.generation}"
    if told.configuration is not None:
        words += f", of configuration {told.configuration}"
    page.field("RULES", words)
    if told.configuration is None:
        words = "names are not known: no last good configuration of this node (--state-dir, --node)"
        page.field("", words, "yellow")
    if not told.watchlists:
        return
    page.gap()
    header = ["WATCHLIST", "COLLECTOR", "RULES", *_COLUMNS.values()]
    page.table(header, map(_watchlist, told.watchlists), left=2)
    for each in told.watchlists:
        for words in _more(each):
            page.beside([("dim", f"{each.name}: ")], words, "dim")


def _watchlist(each: look.Watchlist) -> list[str | Cell]:
    counts = [_count(max(0, each.counters[name])) for name in _COLUMNS]
    return [each.name, cut(each.collector, _MOST_COLLECTOR), _count(each.rules), *counts]


def _more(each: look.Watchlist) -> Iterator[str]:
    """What has no column, and is no loss."""
    if not each.live:
        yield "not live: its collector is none of this node's"
    rest = {n: c for n, c in each.counters.items() if n not in (*_COLUMNS, *tallies.MEANINGS)}
    rest = {"waiting for an outcome": each.pending} | rest
    told = ", ".join(f"{_count(c)} {n.replace('_', ' ')}" for n, c in rest.items() if c > 0)
    if told:
        yield f"also {told}"


def _collectors(page: Page, told: look.Status) -> None:
    if told.collectors:
        page.gap()
        header = ["COLLECTOR", "ADDRESS", "RATE LIMIT", "SENT", "FAILED"]
        page.table(header, map(_collector, told.collectors), left=2)


def _collector(each: look.Collector) -> list[str | Cell]:
    address = f"[{each.address}]" if ":" in (each.address or "") else each.address
    limit = f"{_count(each.reports_per_second)}/s" if each.reports_per_second else "none"
    return [
        each.name,
        f"{address}:{each.port}" if address else ("not known" if each.live else "not in use"),
        limit if each.live else "-",
        _count(each.sent),
        _bad(each.failed),
    ]


def _filled(page: Page, told: look.Status) -> None:
    page.gap()
    page.field("FLOWS", f"{_of(told.flows, told.flow_places)} places of the table taken")
    slots = ", ".join(f"{_count(count)} {state}" for state, count in told.slots.items() if count)
    page.field("SLOTS", f"of {_count(sum(told.slots.values()))}: {slots}")
    for label, kind in (("RINGS", "flow"), ("", "drop")):
        page.field(label, *_rings(kind, [ring for ring in told.rings if ring.kind == kind]))
    if told.drops:
        drops = sorted(_drops(told), key=lambda drop: -drop[1])
        page.field("DROPS", ", ".join(f"{_count(count)} {what}" for what, count in drops))
    if told.rates:
        r = told.rates
        words = f"{_rate(r.watched)} watched, {_rate(r.reports)} reported, {_rate(r.sent)} sent, {_rate(r.drops)} dropped"
        page.field("RATES", f"{words} (over {r.seconds:.1f} s)")


def _drops(told: look.Status) -> Iterator[tuple[str, int]]:
    """Yield what drops there are, and how many, by function where the reason does not say why."""
    for reason, count in told.drops.items():
        functions = told.drop_functions.get(reason, {})
        for function, in_function in functions.items():
            yield f"{reason} in {function}", in_function
        # Also those of an older datapath, whose functions are not carried over.
        rest = count - sum(functions.values())
        if rest > 0:
            yield reason, rest


def _rings(kind: str, rings: Sequence[look.Ring]) -> tuple[str, str]:
    full = max(ring.waiting / ring.size for ring in rings)
    colour = "red" if full >= 1 else "yellow" if full >= 0.5 else ""
    waiting = [f"{_of(r.waiting, r.size)} on CPU {r.cpu}" for r in rings if r.waiting]
    others = f"{'the others' if waiting else f'all {len(rings)}'} empty"
    if len(waiting) < len(rings):
        waiting.append(others)
    return f"{kind}: {', '.join(waiting)}", colour


def _lost(page: Page, told: look.Status) -> None:
    page.gap()
    if not told.losses:
        page.field("LOST", "nothing lost", "green")
        return
    page.beside([("bold", f"{'LOST':<22}{'COUNT':>11}{'NOW':>11}  WHERE")], "")
    for loss in told.losses:
        now = "" if loss.per_second is None else _rate(loss.per_second)
        owners = sorted(loss.where.items(), key=lambda item: -item[1])
        where = ", ".join(f"{n} {_count(c)}" if len(owners) > 1 else n for n, c in owners)
        cells = [
            ("red" if loss.per_second else "yellow", f"{loss.name:<22}{_count(loss.count):>11}")
        ]
        page.beside([*cells, ("", f"{now:>11}  ")], where)
        page.beside([("", "  ")], loss.meaning)


def _count(number: int) -> str:
    """At most 11 columns, exact below a thousand millions."""
    for size, unit in _SIZES:
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,}"


def _of(number: int, most: int) -> str:
    return f"{_count(number)} of {_count(most)} ({100 * number / most:.0f} %)"


def _rate(per_second: float) -> str:
    return f"{per_second:,.1f}/s" if 0 < per_second < 10 else f"{_count(round(per_second))}/s"


def _bad(number: int) -> str | Cell:
    return ("red", _count(number)) if number else "0"


def _age(seconds: float) -> str:
    """The two largest units."""
    left = int(seconds)
    words: list[str] = []
    for size, unit in _AGES:
        if left >= size or words:
            words.append(f"{left // size} {unit}")
            left %= size
    return " ".join(words[:2]) or "0 s"
