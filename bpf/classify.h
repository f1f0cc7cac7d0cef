/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The classifier. An address, and a port, belongs to a class: the set of rules that can match it. Four classes (source,
 * destination, destination port, source port) decide; the combination is looked up in a per-CPU cache, and on a miss the
 * four rule sets are intersected: the lowest common bit is the first rule that matches. agent/hostint_agent/classifier.py
 * compiles the tables.
 *
 * Every table exists twice. A packet reads the generation once and uses that side only, so that one store makes any
 * change of all tables visible at once.
 */
#pragma once
#include "maps.h"
#include "scratch.h"

#define NR_RULES 16384
#define RULE_WORDS (NR_RULES / 64)    /* of 64 rules each */
#define SUMMARY_WORDS (RULE_WORDS / 64) /* one bit for each rule word that is not zero */
#define SEGMENT_WORDS 16
#define ROW_SEGMENTS (RULE_WORDS / SEGMENT_WORDS)
#define NR_CLASSES 32768
#define NR_CLASS_WORDS 524288
#define NR_TRIE_CHUNKS 8192
#define NR_BUCKETS6 8192
#define MAX_LENGTHS6 16
#define MAX_PROBES6 4
#define NR_PORT_PAGES 4096
#define NR_PORT_GROUPS 16
#define NR_CACHE_SETS 8192 /* per CPU */
#define CACHE_SET_BITS 13

/* leaf of an address: source class in the low half, destination class above; bit 31: go on in that chunk */
#define LEAF_CHUNK 0x80000000U
/* port root entry: bit 15: go on in that page */
#define PORT_PAGE 0x8000

enum classify_flag {
	CLASSIFY_MATCH = 1,    /* a rule matched, of any action */
	CLASSIFY_POSSIBLE = 2, /* none did, but one side is in a class: NAT may still make it match */
};

struct classifier_side {
	__u32 default_leaf6; /* IPv6 addresses of no prefix */
	__u32 nr_lengths6;
	__u32 generation; /* of the verdict cache */
	__u16 any_source; /* class of the rules without source prefixes */
	__u16 any_destination;
	__u64 mask_high[MAX_LENGTHS6]; /* longest first */
	__u64 mask_low[MAX_LENGTHS6];
	__u32 length[MAX_LENGTHS6];
	__u16 no_ports[NR_PORT_GROUPS]; /* class of the rules without ports */
	__u8 group[256]; /* of an IP protocol */
};

struct trie_block {
	__u32 leaf[256];
};

struct prefix6 {
	__u64 high;
	__u64 low;
	__u32 leaf;
	__u16 length; /* 0: empty */
	__u16 overflow; /* of the first entry of a bucket: an entry went on to the next bucket */
	__u64 pad;
};

struct bucket6 {
	struct prefix6 entry[2];
};

struct port_block {
	__u16 leaf[256];
};

struct class_row {
	__u64 summary[SUMMARY_WORDS];
	__u32 segment[ROW_SEGMENTS]; /* first word of each segment in class_words; segment 0 is all zero */
	__u64 pad[SUMMARY_WORDS];
};

struct cached_verdict {
	__u64 classes;
	__u32 generation;
	__u32 rule; /* bit + 1, 0: none */
};

struct cache_set {
	struct cached_verdict way[2];
};

PINNED_MMAPABLE(classifier_generation, __u64, 1);
PINNED_MMAPABLE(classifier_sides, struct classifier_side, 2);
PINNED_MMAPABLE(trie_roots, struct trie_block, 512);
PINNED_MMAPABLE(trie_chunks, struct trie_block, 2 * NR_TRIE_CHUNKS);
PINNED_MMAPABLE(gates6, __u64, 2048);
PINNED_MMAPABLE(buckets6, struct bucket6, 2 * NR_BUCKETS6);
PINNED_MMAPABLE(port_roots, struct port_block, 64);
PINNED_MMAPABLE(port_pages, struct port_block, 2 * NR_PORT_PAGES);
PINNED_MMAPABLE(class_rows, struct class_row, 2 * NR_CLASSES);
PINNED_MMAPABLE(class_words, __u64, 2 * NR_CLASS_WORDS);
PINNED_MMAPABLE(classifier_rules, struct verdict, 2 * NR_RULES);
PINNED_ARRAY(verdict_cache, struct cache_set, NR_CPUS * NR_CACHE_SETS);

/* Source and destination class of an IPv4 address: a trie of 16, 8 and 8 bits. */
static __always_inline __u32 leaf_of_ipv4(__u32 side, __be32 address_be)
{
	__u32 address = bpf_ntohl(address_be);
	__u32 index = side * 256 + (address >> 24);
	struct trie_block *block = trie_roots.lookup(&index);
	__u32 leaf;

	if (!block)
		return 0;
	leaf = block->leaf[(address >> 16) & 255];
	if (leaf & LEAF_CHUNK) {
		index = side * NR_TRIE_CHUNKS + (leaf & ~LEAF_CHUNK);
		block = trie_chunks.lookup(&index);
		if (!block)
			return 0;
		leaf = block->leaf[(address >> 8) & 255];
	}
	if (leaf & LEAF_CHUNK) {
		index = side * NR_TRIE_CHUNKS + (leaf & ~LEAF_CHUNK);
		block = trie_chunks.lookup(&index);
		if (!block)
			return 0;
		leaf = block->leaf[address & 255];
	}
	return leaf;
}

/* classifier.py has the same function. */
static __always_inline __u32 hash_prefix6(__u64 high, __u64 low, __u32 length)
{
	__u64 hash = (high + length) * 0x9e3779b97f4a7c15ULL;

	hash ^= hash >> 31;
	hash = (hash ^ low) * 0xbf58476d1ce4e5b9ULL;
	hash ^= hash >> 29;
	hash *= 0x94d049bb133111ebULL;
	return (__u32)(hash >> 40);
}

/* Source and destination class of an IPv6 address: a hash probed once for each prefix length, longest first. */
static __always_inline __u32 leaf_of_ipv6(__u32 side, const struct classifier_side *tables, const __be32 *address)
{
	__u64 high = ((__u64)bpf_ntohl(address[0]) << 32) | bpf_ntohl(address[1]);
	__u64 low = ((__u64)bpf_ntohl(address[2]) << 32) | bpf_ntohl(address[3]);
	__u32 index = side * 1024 + (__u32)(high >> 54);
	__u64 *gate = gates6.lookup(&index);

	/* one bit for each value of the top 16 bits under which there is any prefix */
	if (!gate || !((*gate >> ((high >> 48) & 63)) & 1))
		return tables->default_leaf6;
	for (__u32 i = 0; i < MAX_LENGTHS6; i++) {
		__u64 masked_high, masked_low;
		__u32 hash, length;

		if (i >= tables->nr_lengths6)
			break;
		masked_high = high & tables->mask_high[i];
		masked_low = low & tables->mask_low[i];
		length = tables->length[i];
		hash = hash_prefix6(masked_high, masked_low, length);
		for (__u32 probe = 0; probe < MAX_PROBES6; probe++) {
			__u32 at = side * NR_BUCKETS6 + ((hash + probe) & (NR_BUCKETS6 - 1));
			struct bucket6 *bucket = buckets6.lookup(&at);

			if (!bucket)
				return 0;
			if (bucket->entry[0].length == length && bucket->entry[0].high == masked_high &&
			    bucket->entry[0].low == masked_low)
				return bucket->entry[0].leaf;
			if (bucket->entry[1].length == length && bucket->entry[1].high == masked_high &&
			    bucket->entry[1].low == masked_low)
				return bucket->entry[1].leaf;
			if (!bucket->entry[0].overflow)
				break;
		}
	}
	return tables->default_leaf6;
}

/* Class of a port; group as in classifier_side, source ports NR_PORT_GROUPS above. */
static __always_inline __u32 class_of_port(__u32 side, __u32 group, __u16 port)
{
	__u32 index = side * 2 * NR_PORT_GROUPS + group;
	struct port_block *block = port_roots.lookup(&index);
	__u32 leaf;

	if (!block)
		return 0;
	leaf = block->leaf[port >> 8];
	if (leaf & PORT_PAGE) {
		index = side * NR_PORT_PAGES + (leaf & ~PORT_PAGE);
		block = port_pages.lookup(&index);
		if (!block)
			return 0;
		leaf = block->leaf[port & 255];
	}
	return leaf;
}

static __always_inline __u32 lowest_bit(__u64 word)
{
	__u64 below = (word & -word) - 1;

	/* newer LLVM would see what this is about and put a table into .rodata, which BPF programs of bcc cannot have */
	asm volatile("" : "+r"(below));
	below = below - ((below >> 1) & 0x5555555555555555ULL);
	below = (below & 0x3333333333333333ULL) + ((below >> 2) & 0x3333333333333333ULL);
	below = (below + (below >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return (__u32)((below * 0x0101010101010101ULL) >> 56);
}

/* 64 rules of a class; NULL never happens, but leaving at once keeps the verifier's paths from multiplying */
static __always_inline const __u64 *rule_word(__u32 side, const struct class_row *row, __u32 summary, __u32 word)
{
	__u32 index = side * NR_CLASS_WORDS + row->segment[summary * 4 + (word >> 4)] + (word & 15);

	return class_words.lookup(&index);
}

static __always_inline struct class_row *row_of(__u32 side, __u32 class)
{
	__u32 index = side * NR_CLASSES + (class & (NR_CLASSES - 1));

	return class_rows.lookup(&index);
}

/* The first rule that is in all four classes: its bit + 1, or 0. */
static __always_inline __u32 intersect(__u32 side, const struct classifier_side *tables,
				       const struct scratch *scratch)
{
	struct class_row *from = row_of(side, scratch->source), *from_any = row_of(side, tables->any_source);
	struct class_row *to = row_of(side, scratch->destination), *to_any = row_of(side, tables->any_destination);
	struct class_row *port = row_of(side, scratch->destination_port), *sport = row_of(side, scratch->source_port);

	if (!from || !from_any || !to || !to_any || !port || !sport)
		return 0;
#pragma clang loop unroll(disable)
	for (__u32 i = 0; i < SUMMARY_WORDS; i++) {
		__u64 left = (from->summary[i] | from_any->summary[i]) & (to->summary[i] | to_any->summary[i]) &
			     port->summary[i] & sport->summary[i];

		for (__u32 n = 0; n < 64; n++) {
			const __u64 *rules;
			__u64 common, more;
			__u32 word;

			if (!left)
				break;
			word = lowest_bit(left);
			left &= left - 1;
			/* one register, or the verifier bounds one copy and LLVM uses the other */
			asm volatile("" : "+r"(word));
			word &= 63;
			rules = rule_word(side, from, i, word);
			if (!rules)
				return 0;
			common = *rules;
			rules = rule_word(side, from_any, i, word);
			if (!rules)
				return 0;
			common |= *rules;
			rules = rule_word(side, to, i, word);
			if (!rules)
				return 0;
			more = *rules;
			rules = rule_word(side, to_any, i, word);
			if (!rules)
				return 0;
			common &= more | *rules;
			rules = rule_word(side, port, i, word);
			if (!rules)
				return 0;
			common &= *rules;
			rules = rule_word(side, sport, i, word);
			if (!rules)
				return 0;
			common &= *rules;
			if (common)
				return (i * 64 + word) * 64 + lowest_bit(common) + 1;
		}
	}
	return 0;
}

/* intersect, remembered per CPU: the number of combinations that occur is small however many flows there are. */
static __always_inline __u32 intersect_cached(__u32 side, const struct classifier_side *tables,
					      const struct scratch *scratch)
{
	__u64 classes = (__u64)scratch->source | ((__u64)scratch->destination << 16) |
			((__u64)scratch->destination_port << 32) | ((__u64)scratch->source_port << 48);
	__u32 set = (__u32)((classes * 0x9e3779b97f4a7c15ULL) >> (64 - CACHE_SET_BITS));
	__u32 index = (bpf_get_smp_processor_id() & (NR_CPUS - 1)) * NR_CACHE_SETS + set;
	struct cache_set *cached = verdict_cache.lookup(&index);
	__u32 rule;

	if (!cached)
		return 0;
	if (likely(cached->way[0].classes == classes && cached->way[0].generation == tables->generation))
		return cached->way[0].rule;
	if (likely(cached->way[1].classes == classes && cached->way[1].generation == tables->generation))
		return cached->way[1].rule;
	rule = intersect(side, tables, scratch);
	cached->way[1] = cached->way[0];
	cached->way[0].classes = classes;
	cached->way[0].generation = tables->generation;
	cached->way[0].rule = rule;
	return rule;
}

/* How many commits there were; a program reads it once and uses the side that it names, of all tables. */
static __always_inline __u64 live_generation(void)
{
	__u32 zero = 0;
	__u64 *generation = classifier_generation.lookup(&zero);

	return generation ? READ_ONCE(*generation) : 0;
}

static __always_inline __u32 side_of(__u64 generation)
{
	return generation & 1;
}

/*
 * Judge a tuple by one side. Returns enum classify_flag bits; out is set on a match. What is found on the way goes
 * through scratch memory: the verifier forgets there what it knew, and so has fewer states to walk. `cached` is a constant:
 * a tracepoint program may be interrupted by a TC program on its CPU and must leave the cache alone.
 */
static __always_inline __u32 classify(const struct flow_key *key, struct scratch *scratch, struct verdict *out,
				      __u32 side, bool cached)
{
	__u32 group, rule;
	struct classifier_side *tables = classifier_sides.lookup(&side);
	struct verdict *verdict;

	if (!tables)
		return 0;
	if (key->family == 4) {
		scratch->source = leaf_of_ipv4(side, key->source[0]) & 0xffff;
		scratch->destination = leaf_of_ipv4(side, key->destination[0]) >> 16;
	} else {
		scratch->source = leaf_of_ipv6(side, tables, key->source) & 0xffff;
		scratch->destination = leaf_of_ipv6(side, tables, key->destination) >> 16;
	}
	barrier();
	if (!scratch->source && !tables->any_source)
		return scratch->destination || tables->any_destination ? CLASSIFY_POSSIBLE : 0;
	if (!scratch->destination && !tables->any_destination)
		return CLASSIFY_POSSIBLE;
	group = tables->group[key->protocol] & (NR_PORT_GROUPS - 1);
	if (key->no_ports) {
		scratch->destination_port = tables->no_ports[group];
		scratch->source_port = tables->no_ports[group];
	} else {
		scratch->destination_port = class_of_port(side, group, key->destination_port);
		scratch->source_port = class_of_port(side, group + NR_PORT_GROUPS, key->source_port);
	}
	barrier();
	if (!scratch->destination_port || !scratch->source_port)
		return CLASSIFY_POSSIBLE;
	rule = cached ? intersect_cached(side, tables, scratch) : intersect(side, tables, scratch);
	if (!rule)
		return CLASSIFY_POSSIBLE;
	rule += side * NR_RULES - 1;
	verdict = classifier_rules.lookup(&rule);
	if (!verdict || !verdict->action)
		return CLASSIFY_POSSIBLE;
	*out = *verdict;
	return CLASSIFY_MATCH;
}
