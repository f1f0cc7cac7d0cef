# SPDX-License-Identifier: Apache-2.0
"""The compiler without a kernel: what a small change costs, where the limits are, and what is left of a refusal."""

import dataclasses
import ipaddress
import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostint_agent import (
    address_tables,
    classifier,
    classifier_sizes,
    loader,
    rule_order,
)
from tests.agent import reference_classifier
from tests.agent.classifier_probe import rule


def nets(*texts: str) -> tuple[classifier.Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def test_sizes_are_those_of_the_c_source():
    text = re.sub(r"/\*.*?\*/", "", (loader.default_bpf_dir() / "classify.h").read_text())
    defined = dict(re.findall(r"^#define (\w+) (.+)", text, re.MULTILINE))
    sizes = {n: v for n, v in vars(classifier_sizes).items() if isinstance(v, int)}
    # what only one of the two needs, by another name
    assert sizes.pop("SEGMENT_RULES") == 64 * sizes["SEGMENT_WORDS"]

    def value(expression: str) -> int:
        named = re.sub(r"\b[A-Z]\w+", lambda name: f"({value(defined[name[0]])})", expression)
        return eval(re.sub(r"\bU\b|(?<=[0-9a-f])U\b", "", named).replace("/", "//"))

    assert {name: value(defined[name]) for name in sizes} == sizes


def follows(compiler: classifier.Compiler, rules: list[classifier.Rule]) -> bool:
    """Compile; whether what was there was changed, rather than made anew."""
    before = compiler._state
    compiler.compile(rules)
    return compiler._state is before


def test_a_rule_that_comes_goes_or_changes_does_not_compile_the_others_anew():
    rules = [rule(n + 1, sources=nets(f"10.{n // 256}.{n % 256}.0/24")) for n in range(2000)]
    compiler = classifier.Compiler()
    compiler.compile(rules)
    other = rule(9999, sources=nets("fd00::/64"), protocol=17, destination_ports=((5, 9),))
    for at in (0, 1, 1000, 1999):
        assert follows(compiler, [*rules[:at], other, *rules[at:]])
        assert follows(compiler, rules)
        assert follows(compiler, [*rules[:at], *rules[at + 1 :]])
        assert follows(compiler, rules)
        changed = dataclasses.replace(rules[at], sources=other.sources)
        assert follows(compiler, [*rules[:at], changed, *rules[at + 1 :]])
        assert follows(compiler, rules)
    assert follows(compiler, [*rules, other])


def test_edits_seldom_compile_all_rules_anew():
    world = reference_classifier.World(1)
    compiler, rules = classifier.Compiler(), world.rules(300)
    compiler.compile(rules)
    followed = 0
    for _ in range(100):
        rules = world.edited(rules)
        followed += follows(compiler, rules)
    # a rule that moves far is the exception
    assert followed > 60


def test_a_list_that_shrinks_to_a_few_rules_lies_dense_again():
    rules = [rule(n + 1, sources=nets(f"10.{n // 256}.{n % 256}.0/24")) for n in range(4000)]
    compiler = classifier.Compiler()
    for count in range(4000, 0, -30):
        compiler.compile(rules[-count:])
        assert compiler._state._positions[-1] <= 2 * count + 1024


def compiled(compiler: classifier.Compiler, rules: list[classifier.Rule]):
    """The image, or what did not fit."""
    try:
        return compiler.compile(rules)
    except classifier.LimitExceeded as refusal:
        return refusal


def edited(world: reference_classifier.World, rules: list[classifier.Rule]):
    return [*world.edited(rules), world.rule()]


def one_rule_of_each(kind: str, world: reference_classifier.World) -> list[classifier.Rule]:
    """A rule for each of some protocols, or of some prefix lengths: about as many as fit."""
    numbers = world.sample(range(90, 110), {"protocols": (8, 13), "lengths": (13, 19)}[kind])
    if kind == "protocols":
        return [rule(number, protocol=number) for number in numbers]
    return [rule(number, destinations=nets(f"fd00::/{number}")) for number in numbers]


LIMITS = {
    "NR_CLASSES": (40, "classes of addresses and ports", edited),
    "NR_CLASS_WORDS": (640, "words of rule sets", edited),
    "NR_TRIE_CHUNKS": (25, "blocks of the IPv4 address trie", edited),
    "NR_PORT_PAGES": (12, "pages of port ranges", edited),
    "NR_PORT_GROUPS": (
        16,
        "protocols named by rules",
        lambda world, _: one_rule_of_each("protocols", world),
    ),
    "MAX_LENGTHS6": (
        16,
        "different IPv6 prefix lengths",
        lambda world, _: one_rule_of_each("lengths", world),
    ),
}


@pytest.mark.parametrize("name", LIMITS)
def test_what_is_refused_does_not_depend_on_what_was_compiled_before(monkeypatch, name):
    limit, what, following = LIMITS[name]
    monkeypatch.setattr(classifier_sizes, name, limit)
    world = reference_classifier.World(7)
    compiler, rules = classifier.Compiler(), world.rules(4)
    outcomes = set()
    for _ in range(100):
        fresh = compiled(classifier.Compiler(), rules)
        outcome = compiled(compiler, rules)
        assert type(outcome) is type(fresh)
        outcomes.add(type(outcome))
        if isinstance(outcome, classifier.LimitExceeded):
            assert outcome.what == fresh.what == what
            assert outcome.needed > outcome.limit == fresh.limit
            rules = rules[: len(rules) // 2]
        rules = following(world, rules)
    assert len(outcomes) == 2


def test_after_a_refusal_the_next_list_is_compiled_as_if_nothing_had_been():
    rules = [rule(n + 1, sources=nets(f"10.0.0.{n}")) for n in range(9)]
    too_many = [rule(100 + n, sources=nets(f"fd00::/{n}")) for n in range(100, 117)]
    compiler = classifier.Compiler()
    compiler.compile([*rules, *too_many[1:]])
    with pytest.raises(classifier.LimitExceeded, match="17 needed, at most 16"):
        compiler.compile([*rules, *too_many])
    assert compiler.compile(rules) == classifier.compile_rules(rules)


def exact(name: str, rules_of) -> None:
    """As many as there is room for fit, and one more does not; both numbers are told."""
    limit = getattr(classifier_sizes, name)
    classifier.compile_rules(rules_of(limit))
    with pytest.raises(
        classifier.LimitExceeded, match=rf"{limit + 1} needed, at most {limit} are possible"
    ):
        classifier.compile_rules(rules_of(limit + 1))


def test_rules_fit_up_to_the_limit():
    exact("NR_RULES", lambda count: [rule(number + 1) for number in range(count)])


def test_blocks_of_the_ipv4_trie_fit_up_to_the_limit():
    def rules_of(count: int) -> list[classifier.Rule]:
        networks = (ipaddress.IPv4Network((number << 16, 17)) for number in range(count))
        return [rule(1, sources=tuple(networks))]

    exact("NR_TRIE_CHUNKS", rules_of)


def test_classes_fit_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(classifier_sizes, "NR_CLASSES", 1000)

    def rules_of(count: int) -> list[classifier.Rule]:
        # of no rule, of all rules (no port is asked for), and one of each source
        return [rule(n + 1, sources=nets(f"10.0.{n >> 8}.{n & 255}")) for n in range(count - 2)]

    exact("NR_CLASSES", rules_of)


def test_words_of_rule_sets_fit_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(classifier_sizes, "NR_CLASS_WORDS", 1600)

    def rules_of(count: int) -> list[classifier.Rule]:
        return [rule(n + 1, sources=nets(f"10.0.{n >> 8}.{n & 255}")) for n in range(count - 2)]

    classifier.compile_rules(rules_of(100))
    with pytest.raises(classifier.LimitExceeded, match="1616 needed, at most 1600 are possible"):
        classifier.compile_rules(rules_of(101))


def test_rules_lie_dense_where_the_room_between_them_is_needed(monkeypatch):
    """1,024 rules fill one segment, and with gaps a part of a second one."""
    rules = [rule(n + 1, protocol=6) for n in range(1024)]
    assert len(classifier.compile_rules(rules).tables["class_words"]) == 3
    monkeypatch.setattr(classifier_sizes, "NR_CLASS_WORDS", 2 * 16)
    assert len(classifier.compile_rules(rules).tables["class_words"]) == 2


def test_ipv6_prefixes_lie_as_if_all_had_come_in_order_whatever_came_and_went(monkeypatch):
    monkeypatch.setattr(address_tables, "_NR_BUCKETS6", 64)
    world = reference_classifier.World(3)
    hosts = sorted({str(world.address(6)) for _ in range(130)})
    # alone under their top 16 bits
    hosts += [f"{number:x}::1" for number in range(0x3000, 0x3014)]

    def table(compiler: classifier.Compiler, rules: list[classifier.Rule]):
        image = compiled(compiler, rules)
        if isinstance(image, classifier.LimitExceeded):
            return str(image)
        # without the leaves: the numbers of classes are a matter of history
        places = [block[:16] + block[20:48] + block[52:] for block in image.tables["buckets6"]]
        return places, image.tables["gates6"]

    compiler, outcomes = classifier.Compiler(), set()
    for _ in range(200):
        kept = world.sample(hosts, (30, 90))
        # others come, some stay, some go; then some go and none comes
        for named in (kept, world.sample(kept, (20, 29))):
            rules = [rule(1, sources=nets("fd00::/16")), rule(2, sources=nets(*named))]
            fresh = table(classifier.Compiler(), rules)
            assert table(compiler, rules) == fresh
            outcomes.add(type(fresh))
    assert outcomes == {str, tuple}


names = st.lists(st.integers(0, 40), unique=True, max_size=40)


@given(old=names, new=names, spacing=st.sampled_from([1.0, rule_order.SPACING, 3.0]))
def test_positions_grow_and_what_continues_keeps_its_order(old, new, spacing):
    positions = rule_order.spread(len(old), 0, classifier_sizes.NR_RULES, spacing)
    following = rule_order.follow(old, positions, new, lambda item: item)
    assert following is not None
    end = len(old) - following.tail
    after = [*positions[: following.head], *following.placed, *positions[end:]]
    assert len(after) == len(new)
    assert after == sorted(set(after))
    assert not after or (after[0] >= 0 and after[-1] < classifier_sizes.NR_RULES)
    continued = [index for index in following.matched if index is not None]
    assert continued == sorted(set(continued))
    middle = new[following.head : len(new) - following.tail]
    pairs = zip(following.matched, middle, strict=True)
    assert all(old[index] == item for index, item in pairs if index is not None)
    assert old[: following.head] == new[: following.head]


def test_a_full_list_takes_no_more_and_its_last_place_is_used():
    full = [*range(classifier_sizes.NR_RULES - 1)]
    positions = rule_order.spread(len(full), 0, classifier_sizes.NR_RULES)
    for at in (0, len(full) // 2, len(full)):
        longer = [*full[:at], -1, *full[at:]]
        following = rule_order.follow(full, positions, longer, lambda item: item)
        if following is not None:
            end = len(full) - following.tail
            after = [*positions[: following.head], *following.placed, *positions[end:]]
            assert after == [*range(classifier_sizes.NR_RULES)]
    assert following is not None


def test_rules_that_come_one_after_the_other_at_one_place_move_few_others():
    items = [*range(1000)]
    positions = rule_order.spread(len(items), 0, classifier_sizes.NR_RULES)
    moved = anew = 0
    for number in range(2000):
        longer = [*items[:500], -number - 1, *items[500:]]
        following = rule_order.follow(items, positions, longer, lambda item: item)
        if following is None:
            anew += 1
            positions = rule_order.spread(len(longer), 0, classifier_sizes.NR_RULES)
        else:
            end = len(items) - following.tail
            kept = [positions[i] for i in following.matched if i is not None]
            placed = [
                p for i, p in zip(following.matched, following.placed, strict=True) if i is not None
            ]
            moved += sum(one != other for one, other in zip(kept, placed, strict=True))
            positions = [*positions[: following.head], *following.placed, *positions[end:]]
        items = longer
    assert anew < 2000 // 4
    assert moved < 2000 * 64


def test_what_a_compiler_keeps_of_few_rules_is_small():
    rules = reference_classifier.World(1).rules(10)
    tracemalloc.start()
    compiler = classifier.Compiler()
    compiler.compile(rules)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < kept < 500_000
