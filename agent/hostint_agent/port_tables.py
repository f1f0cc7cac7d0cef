# SPDX-License-Identifier: Apache-2.0
"""Pure: the classes of ports, for every group of protocols and both directions, and the tables of bpf/classify.h for them."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence

from hostint_agent import classifier_sizes, rule_sets, table_blocks

DESTINATION, SOURCE = 0, 1
PORTS = 65536
# port groups: a protocol with ports or types of its own, and one for all others
_GROUPS = {6: 0, 17: 1, 132: 2, 1: 3, 58: 4}
_OTHER_GROUP = 5
_PORTED_GROUPS = (0, 1, 2)
_ALL_PORTS = ((0, PORTS - 1),)

PortRange = tuple[int, int]


def merged(ranges: Iterable[PortRange]) -> list[PortRange]:
    """Ranges without overlap, so that each edge of a rule is crossed once."""
    found: list[PortRange] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


class PortMap:
    """Which class a port is in: pieces, each from its start to the next one's; neighbours differ."""

    def __init__(self, sets: rule_sets.RuleSets) -> None:
        self._sets = sets
        self._starts = [0]
        self._classes = [sets.hold(rule_sets.EMPTY)]
        self._edges: dict[int, rule_sets.Toggled] = {}

    def toggle(self, ranges: Iterable[PortRange], position: int) -> None:
        """A rule enters or leaves these ports; takes effect when settled."""
        for first, last in ranges:
            for edge in (first, last + 1):
                if edge not in self._edges:
                    self._edges[edge] = rule_sets.Toggled()
                self._edges[edge].add(position)

    def settle(self) -> range:
        """Give every port the class of what its rules are now; the ports that may have changed. Raises LimitExceeded."""
        edges = {port: toggled.bits for port, toggled in self._edges.items() if toggled.bits}
        self._edges = {}
        if not edges:
            return range(0)
        first, last = min(edges), max(edges)
        # one piece more on either side: it may have become the same as its neighbour
        low = max(0, bisect_right(self._starts, first) - 2)
        high = bisect_right(self._starts, last) + 1
        self._rebuild(low, min(high, len(self._starts)), edges)
        return range(first, last)

    def pieces(self, first: int, end: int) -> list[tuple[int, int]]:
        """(first port, class) of the pieces that these ports are in; the first one may begin before them."""
        low = bisect_right(self._starts, first) - 1
        high = bisect_right(self._starts, end - 1)
        return list(zip(self._starts[low:high], self._classes[low:high], strict=True))

    def _rebuild(self, low: int, high: int, edges: Mapping[int, rule_sets.Toggles]) -> None:
        """Make the pieces from low to high anew. Who had the class of the piece before has it still, but for its own edge."""
        old = dict(zip(self._starts[low:high], self._classes[low:high], strict=True))
        starts: list[int] = []
        classes: list[int] = []
        before, now, inside = -1, -1, rule_sets.Toggled()
        for port in sorted({*old, *(edge for edge in edges if edge < PORTS)}):
            toggles = edges.get(port, {})
            inside.merge(toggles)
            was = old.get(port, before)
            if was == before:
                now = self._sets.toggled(now, toggles)
            else:
                now = self._sets.toggled(was, inside.bits)
            before = was
            if classes and classes[-1] == now:
                self._sets.release(now)
            else:
                starts.append(port)
                classes.append(now)
        self._starts[low:high] = starts
        self._classes[low:high] = classes
        for held in old.values():
            self._sets.release(held)


class PortTables:
    """Port classes of every group, and where the rules without ports are."""

    def __init__(self, sets: rule_sets.RuleSets, protocols: Iterable[int]) -> None:
        """`protocols`: those that rules name. Raises LimitExceeded."""
        self._groups = dict(_GROUPS)
        for protocol in protocols:
            # one number is taken by _OTHER_GROUP
            self._groups.setdefault(protocol, len(self._groups) + 1)
        count = len(self._groups) + 1
        if count > classifier_sizes.NR_PORT_GROUPS:
            limit = classifier_sizes.NR_PORT_GROUPS - 1
            raise classifier_sizes.LimitExceeded("protocols named by rules", count - 1, limit)
        self._maps = [(PortMap(sets), PortMap(sets)) for _ in range(count)]
        self._without = [rule_sets.Held(sets) for _ in range(count)]
        self.roots = table_blocks.Blocks("H", 256, 2 * classifier_sizes.NR_PORT_GROUPS)
        self.pages = table_blocks.Blocks("H", 256)
        self._free: list[int] = []

    def has_group(self, protocol: int | None) -> bool:
        """Whether rules of this protocol can be told from others."""
        return protocol is None or protocol in self._groups

    def toggle(
        self,
        protocol: int | None,
        source_ports: Sequence[PortRange],
        destination_ports: Sequence[PortRange],
        position: int,
    ) -> None:
        """A rule enters or leaves; takes effect when settled."""
        has_ports = bool(source_ports or destination_ports)
        to_ports = merged(destination_ports or _ALL_PORTS)
        from_ports = merged(source_ports or _ALL_PORTS)
        for group in self._groups_of(protocol, has_ports):
            self._maps[group][DESTINATION].toggle(to_ports, position)
            self._maps[group][SOURCE].toggle(from_ports, position)
            if not has_ports:
                self._without[group].toggle(position)

    def settle(self) -> None:
        """Bring the tables up to date. Raises LimitExceeded."""
        for group, maps in enumerate(self._maps):
            for direction in (DESTINATION, SOURCE):
                changed = maps[direction].settle()
                block = group + direction * classifier_sizes.NR_PORT_GROUPS
                if changed:
                    self._render(block, maps[direction], changed)
            self._without[group].settle()

    def no_ports(self) -> list[int]:
        """Class of the rules without ports, by group."""
        return [held.held for held in self._without]

    def group_of_protocol(self) -> bytes:
        """The group of every protocol number."""
        groups = bytearray([_OTHER_GROUP] * 256)
        for protocol, group in self._groups.items():
            groups[protocol] = group
        return bytes(groups)

    def _groups_of(self, protocol: int | None, has_ports: bool) -> Sequence[int]:
        if protocol is None:
            return _PORTED_GROUPS if has_ports else range(len(self._maps))
        group = self._groups[protocol]
        return (group,) if not has_ports or group in _PORTED_GROUPS else ()

    def _render(self, block: int, ports: PortMap, changed: range) -> None:
        """Write the roots of one group and direction, and the pages they need."""
        roots = self.roots.edit(block)
        for high in range(changed.start >> 8, (min(changed.stop, PORTS) - 1 >> 8) + 1):
            first, end = high * 256, high * 256 + 256
            pieces = ports.pieces(first, end)
            if len(pieces) == 1:
                self._drop_page(roots[high])
                roots[high] = pieces[0][1]
                continue
            if not roots[high] & classifier_sizes.PORT_PAGE:
                roots[high] = classifier_sizes.PORT_PAGE | self._new_page()
            page = self.pages.edit(roots[high] & ~classifier_sizes.PORT_PAGE)
            for (start, held), (stop, _) in zip(pieces, [*pieces[1:], (end, 0)], strict=True):
                begin = max(start, first)
                page[begin - first : stop - first] = array("H", [held]) * (stop - begin)

    def _new_page(self) -> int:
        if self._free:
            return self._free.pop()
        limit = classifier_sizes.NR_PORT_PAGES
        if len(self.pages) >= limit:
            raise classifier_sizes.LimitExceeded("pages of port ranges", limit + 1, limit)
        return self.pages.append()

    def _drop_page(self, root: int) -> None:
        if root & classifier_sizes.PORT_PAGE:
            self._free.append(root & ~classifier_sizes.PORT_PAGE)
