/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What makes a packet itself, whatever NAT, routing or a tunnel do to it. Compiled twice: into the recorders of
 * truth.c, which see packets on the hooks, and by gcc for truth.py, which has the same bytes in reports. Written
 * independently of bpf/parse.h on purpose.
 *
 * Includers define `struct packet` and load(packet, offset, to, bytes), which returns a negative number beyond the end.
 */

struct identity {
	__u64 a; /* the number that the sender wrote, or sequence and acknowledgement numbers */
	__u64 b;
	__u64 c;      /* TCP timestamps, 0 where they were not within reach; else the length */
	__u32 source; /* last four bytes of the addresses, host order */
	__u32 destination;
	__u16 sport;
	__u16 dport;
	__u8 protocol; /* 0: not a packet that can be identified */
	__u8 outer;    /* 1: found inside a tunnel's packet */
	__u8 fragment;
	__u8 complete; /* c was within reach */
};

struct inet {
	__u32 transport; /* offset */
	__u32 id;
	__u16 length;
	__u16 fragment; /* IPv4's field */
};

static __always_inline __u16 be16(const __u8 *bytes)
{
	return bytes[0] << 8 | bytes[1];
}

static __always_inline __u32 be32(const __u8 *bytes)
{
	return (__u32)be16(bytes) << 16 | be16(bytes + 2);
}

static __always_inline __u64 be64(const __u8 *bytes)
{
	return (__u64)be32(bytes) << 32 | be32(bytes + 4);
}

static __always_inline int read_ipv4(struct packet *packet, __u32 at, struct identity *found, struct inet *inet)
{
	__u8 ip[20] = {};

	if (load(packet, at, ip, 20) < 0)
		return -1;
	found->source = be32(ip + 12);
	found->destination = be32(ip + 16);
	found->protocol = ip[9];
	inet->transport = at + (ip[0] & 15) * 4;
	inet->length = be16(ip + 2);
	inet->id = be16(ip + 4);
	inet->fragment = be16(ip + 6) & 0x3fff;
	return 0;
}

static __always_inline int read_ipv6(struct packet *packet, __u32 at, struct identity *found, struct inet *inet)
{
	__u8 ip[40] = {}, fragment[8] = {};

	if (load(packet, at, ip, 40) < 0)
		return -1;
	found->source = be32(ip + 20);
	found->destination = be32(ip + 36);
	found->protocol = ip[6];
	inet->transport = at + 40;
	inet->length = be16(ip + 4);
	if (ip[6] != 44)
		return 0;
	if (load(packet, at + 40, fragment, 8) < 0)
		return -1;
	found->protocol = fragment[0];
	inet->transport += 8;
	inet->fragment = be16(fragment + 2) >> 3 | (fragment[3] & 1) << 13;
	inet->id = be32(fragment + 4);
	return 0;
}

static __always_inline int read_tcp(struct packet *packet, struct identity *found, const struct inet *inet)
{
	__u8 tcp[20] = {}, options[12] = {};

	if (load(packet, inet->transport, tcp, 20) < 0)
		return -1;
	found->sport = be16(tcp);
	found->dport = be16(tcp + 2);
	found->a = be64(tcp + 4);
	found->b = (__u64)inet->length << 48 | (__u64)(inet->id & 0xffff) << 32 | be32(tcp + 12);
	found->complete = load(packet, inet->transport + 20, options, 12) == 0;
	if (found->complete)
		found->c = be64(options + 4);
	return 0;
}

/* The sender repeats the packet's number every eight bytes, so that every fragment carries it. */
static __always_inline int read_fragment(struct packet *packet, struct identity *found, const struct inet *inet)
{
	__u32 header_bytes = inet->fragment & 0x1fff ? 0 : 8;
	__u8 ports[4] = {}, number[8] = {};

	if (load(packet, inet->transport, ports, 4) < 0 || load(packet, inet->transport + header_bytes, number, 8) < 0)
		return -1;
	if (header_bytes) {
		found->sport = be16(ports);
		found->dport = be16(ports + 2);
	}
	found->a = be64(number);
	/* not the id: IPv6 that was put together and taken apart again has another */
	found->b = (__u64)inet->fragment << 32 | inet->length;
	found->fragment = 1;
	found->complete = 1;
	return 0;
}

/* UDP, SCTP with one DATA chunk, ICMP: 16 bytes of what the sender wrote. */
static __always_inline int read_payload(struct packet *packet, struct identity *found, const struct inet *inet)
{
	__u8 header[8] = {}, bytes[16] = {};
	__u32 skip = found->protocol == 132 ? 28 : 8;

	if (load(packet, inet->transport, header, 8) < 0 || load(packet, inet->transport + skip, bytes, 16) < 0)
		return -1;
	found->a = be64(bytes);
	found->b = be64(bytes + 8);
	found->c = inet->length;
	found->complete = 1;
	if (found->protocol == 17 || found->protocol == 132) {
		found->sport = be16(header);
		found->dport = be16(header + 2);
	} else {
		found->b = (__u64)be16(header) << 32 | be32(header + 4); /* type, code, id, sequence */
	}
	return 0;
}

static __always_inline int read_transport(struct packet *packet, struct identity *found, const struct inet *inet)
{
	if (inet->fragment)
		return read_fragment(packet, found, inet);
	if (found->protocol == 6)
		return read_tcp(packet, found, inet);
	if (found->protocol == 17 || found->protocol == 132 || found->protocol == 1 || found->protocol == 58)
		return read_payload(packet, found, inet);
	return -1;
}

/* An IP packet at an offset, of an Ethernet type. */
static __always_inline int read_inet(struct packet *packet, __u32 at, __u16 type, struct identity *found,
				     struct inet *inet)
{
	int result;

	if (type == 0x0800)
		result = read_ipv4(packet, at, found, inet);
	else if (type == 0x86dd)
		result = read_ipv6(packet, at, found, inet);
	else
		return -1;
	return result < 0 ? result : read_transport(packet, found, inet);
}

/* An Ethernet frame at an offset. */
static __always_inline int read_frame(struct packet *packet, __u32 at, struct identity *found, struct inet *inet)
{
	__u8 type[2] = {};

	if (load(packet, at + 12, type, 2) < 0)
		return -1;
	at += 14;
	if (be16(type) == 0x8100) {
		if (load(packet, at + 2, type, 2) < 0)
			return -1;
		at += 4;
	}
	return read_inet(packet, at, be16(type), found, inet);
}

/* The innermost frame: VXLAN (4789, 4444) and Geneve (6081, no options) are looked into. */
static __always_inline void identify(struct packet *packet, struct identity *found)
{
	struct inet inet = {};

	if (read_frame(packet, 0, found, &inet) < 0) {
		found->protocol = 0;
		return;
	}
	if (found->protocol != 17 || (found->dport != 4789 && found->dport != 4444 && found->dport != 6081))
		return;
	__u32 inside = inet.transport + 16;

	__builtin_memset(found, 0, sizeof(*found));
	__builtin_memset(&inet, 0, sizeof(inet));
	if (read_frame(packet, inside, found, &inet) < 0)
		found->protocol = 0;
	found->outer = 1;
}
