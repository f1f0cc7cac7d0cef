/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The plain walk of reference_classifier.py once more, for many packets: one rule after the other, one network after the
 * other. Below it, what the tests need to ask about packets that lie close to rules.
 */
#include <stdint.h>
#include <string.h>

#define MAY_MATCH_LATER 0xfffffffeU

struct network {
	uint8_t address[16]; /* IPv4: in the first 4 */
	uint8_t family;      /* 4 or 6 */
	uint8_t length;
};

struct range {
	uint16_t first;
	uint16_t last;
};

/* Parts of a rule are at [first, first + count) of the arrays of all networks and ranges. */
struct part {
	uint32_t first;
	uint32_t count;
};

struct rule {
	uint64_t verdict;
	int32_t protocol; /* -1: any */
	struct part sources, destinations, source_ports, destination_ports;
};

/* struct flow_key of bpf/types.h */
struct packet {
	uint8_t source[16];
	uint8_t destination[16];
	uint16_t source_port;
	uint16_t destination_port;
	uint8_t protocol;
	uint8_t family;
	uint8_t no_ports;
	uint8_t pad;
};

static int is_in(const uint8_t *address, int family, const struct network *network)
{
	if (network->family != family)
		return 0;
	for (int bit = 0; bit < network->length; bit++)
		if (((address[bit / 8] ^ network->address[bit / 8]) >> (7 - bit % 8)) & 1)
			return 0;
	return 1;
}

static int is_in_any(const uint8_t *address, int family, const struct network *networks, struct part part)
{
	for (uint32_t i = 0; i < part.count; i++)
		if (is_in(address, family, &networks[part.first + i]))
			return 1;
	return part.count == 0;
}

static int port_is_in_any(uint16_t port, const struct range *ranges, struct part part)
{
	for (uint32_t i = 0; i < part.count; i++)
		if (ranges[part.first + i].first <= port && port <= ranges[part.first + i].last)
			return 1;
	return part.count == 0;
}

static int takes(const struct rule *rule, const struct range *ranges, const struct packet *packet)
{
	int has_ports = (packet->protocol == 6 || packet->protocol == 17 || packet->protocol == 132) && !packet->no_ports;

	if (rule->protocol >= 0 && rule->protocol != packet->protocol)
		return 0;
	if (rule->source_ports.count == 0 && rule->destination_ports.count == 0)
		return 1;
	return has_ports && port_is_in_any(packet->source_port, ranges, rule->source_ports) &&
	       port_is_in_any(packet->destination_port, ranges, rule->destination_ports);
}

void classify(const struct rule *rules, uint32_t nr_rules, const struct network *networks, const struct range *ranges,
	      const struct packet *packets, uint32_t nr_packets, uint64_t *verdicts)
{
	for (uint32_t i = 0; i < nr_packets; i++) {
		const struct packet *packet = &packets[i];

		verdicts[i] = 0;
		for (uint32_t j = 0; j < nr_rules; j++) {
			int from = is_in_any(packet->source, packet->family, networks, rules[j].sources);
			int to = is_in_any(packet->destination, packet->family, networks, rules[j].destinations);

			if (from && to && takes(&rules[j], ranges, packet)) {
				verdicts[i] = rules[j].verdict;
				break;
			}
			if (from || to)
				verdicts[i] = MAY_MATCH_LATER;
		}
	}
}

static uint64_t random_state;

static uint32_t below(uint32_t limit)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 7;
	random_state ^= random_state << 17;
	return (uint32_t)(random_state >> 20) % limit;
}

/* One more, or one less, than an address of so many bytes. */
static void step(uint8_t *address, int bytes, int by)
{
	for (int i = bytes - 1; i >= 0; i--) {
		address[i] += by;
		if (address[i] != (by > 0 ? 0 : 255))
			return;
	}
}

/* An address at the edge of a network, one beyond it, somewhere in it, or anywhere. */
static void near_network(uint8_t *address, int family, const struct network *network)
{
	uint32_t kind = below(8), ones = kind & 1;
	int bytes = family == 4 ? 4 : 16, start = network ? network->length : 0;

	memset(address, 0, 16);
	if (network)
		memcpy(address, network->address, bytes);
	for (int bit = start; bit < bytes * 8; bit++)
		if (kind >= 6 || !network ? below(2) : ones)
			address[bit / 8] |= 0x80 >> bit % 8;
	if (kind == 4 || kind == 5)
		step(address, bytes, ones ? 1 : -1);
}

static uint16_t near_port(const struct range *ranges, struct part part)
{
	static const uint16_t common[] = { 0, 1, 80, 255, 256, 443, 511, 1023, 1024, 65279, 65280, 65534, 65535 };
	const struct range *range;

	if (!part.count || below(8) == 0)
		return below(4) ? common[below(sizeof(common) / sizeof(common[0]))] : below(65536);
	range = &ranges[part.first + below(part.count)];
	switch (below(5)) {
	case 0:
		return range->first;
	case 1:
		return range->last;
	case 2:
		return range->first - 1;
	case 3:
		return range->last + 1;
	}
	return range->first + below(range->last - range->first + 1);
}

static const struct network *any_of(const struct network *networks, struct part part, int family)
{
	for (int tries = 0; part.count && tries < 8; tries++) {
		const struct network *network = &networks[part.first + below(part.count)];

		if (network->family == family)
			return network;
	}
	return NULL;
}

/* Packets that lie close to a rule; now and then source and destination close to different ones. */
void make_packets(const struct rule *rules, uint32_t nr_rules, const struct network *networks,
		  const struct range *ranges, struct packet *packets, uint32_t nr_packets, uint64_t seed)
{
	static const uint8_t protocols[] = { 6, 6, 17, 17, 132, 1, 58, 47, 50, 0, 255 };

	random_state = seed * 0x9e3779b97f4a7c15ULL + 1;
	for (uint32_t i = 0; i < nr_packets; i++) {
		const struct rule *from = &rules[below(nr_rules)], *to = below(8) ? from : &rules[below(nr_rules)];
		const struct network *network;
		struct packet *packet = &packets[i];

		memset(packet, 0, sizeof(*packet));
		packet->family = below(2) ? 4 : 6;
		/* a rule that takes any address gets one that other rules care about */
		network = any_of(networks, from->sources, packet->family);
		if (!network)
			network = any_of(networks, rules[below(nr_rules)].sources, packet->family);
		near_network(packet->source, packet->family, network);
		network = any_of(networks, to->destinations, packet->family);
		if (!network)
			network = any_of(networks, rules[below(nr_rules)].destinations, packet->family);
		near_network(packet->destination, packet->family, network);
		packet->protocol = from->protocol >= 0 && below(16) ? from->protocol : protocols[below(sizeof(protocols))];
		if (packet->protocol == 6 || packet->protocol == 17 || packet->protocol == 132) {
			packet->no_ports = below(16) == 0;
			if (!packet->no_ports) {
				packet->source_port = near_port(ranges, from->source_ports);
				packet->destination_port = near_port(ranges, to->destination_ports);
			}
		} else if (packet->protocol == 1 || packet->protocol == 58) {
			packet->no_ports = below(16) == 0;
			if (!packet->no_ports)
				packet->destination_port = near_port(ranges, to->destination_ports); /* type << 8 | code */
		} else {
			packet->no_ports = 1;
		}
	}
}
