// SPDX-License-Identifier: Apache-2.0
/*
 * Senders and receivers of the path matrix: every packet carries its number (TCP: its sequence numbers are that). A
 * sender goes on until the recorders of truth.c have seen `target` packets, and waits while a report ring is half full
 * or the gate is closed: nothing here depends on how fast the machine is.
 *
 * flood ROLE KIND key=value...: send udp|tcp|icmp|sctp, serve udp|tcp|sctp, frames udp|tcp.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/if_packet.h>
#include <linux/virtio_net.h>
#include <net/if.h>
#include <netinet/icmp6.h>
#include <netinet/in.h>
#include <netinet/ip_icmp.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_FLOWS	   256
#define BATCH		   64
#define MAX_BYTES	   16384
#define REPLY		   0x80 /* in the first byte of a packet's number */
#define STREAM_BUFFER	   32768
#define GSO_SIZE	   1400
#define UDP_SEGMENT_OPTION 103 /* <linux/udp.h> */
#define UDP_GRO_OPTION	   104
#define RAW_ICMP_FILTER	   1 /* <linux/icmp.h>, which glibc's headers do not go with */

struct position {
	volatile uint64_t count, overflow, unpaired, open, packets, super_packets, first, pad;
};

struct ring_position {
	volatile uint64_t value, pad[7];
};

static struct {
	const char *kind, *to, *from, *interface, *mac;
	const char *positions_path, *heads_path, *tails_path;
	long port, client_port, flows, sources, bytes, target, super_packets, burst, pause_us, limit, rings, cpus, tags,
		reverse, seconds, segment;
} options = {.flows = 1, .sources = 1, .bytes = 32, .burst = 4, .limit = 4096, .seconds = 60};

static struct position *positions;
static struct ring_position *heads, *tails;

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static void *pinned(const char *path, size_t bytes)
{
	union bpf_attr attr = {.pathname = (uintptr_t)path};
	int fd = syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof(attr));
	void *memory;

	if (fd < 0)
		fail(path);
	memory = mmap(NULL, (bytes + 4095) & ~4095UL, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		fail(path);
	close(fd);
	return memory;
}

static const struct {
	const char *name;
	const char **text;
	long *number;
} keys[] = {
	{"to", &options.to},
	{"from", &options.from},
	{"interface", &options.interface},
	{"mac", &options.mac},
	{"positions", &options.positions_path},
	{"heads", &options.heads_path},
	{"tails", &options.tails_path},
	{"port", NULL, &options.port},
	{"client_port", NULL, &options.client_port},
	{"flows", NULL, &options.flows},
	{"sources", NULL, &options.sources},
	{"bytes", NULL, &options.bytes},
	{"target", NULL, &options.target},
	{"super_packets", NULL, &options.super_packets},
	{"burst", NULL, &options.burst},
	{"pause_us", NULL, &options.pause_us},
	{"limit", NULL, &options.limit},
	{"rings", NULL, &options.rings},
	{"cpus", NULL, &options.cpus},
	{"tags", NULL, &options.tags},
	{"reverse", NULL, &options.reverse},
	{"seconds", NULL, &options.seconds},
	{"segment", NULL, &options.segment},
};

static void read_option(const char *word)
{
	size_t length = strcspn(word, "=");

	for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
		if (strlen(keys[i].name) != length || strncmp(keys[i].name, word, length))
			continue;
		if (keys[i].text)
			*keys[i].text = word + length + 1;
		else
			*keys[i].number = atol(word + length + 1);
		return;
	}
	errno = EINVAL;
	fail(word);
}

static double now_s(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

static uint64_t seen(void)
{
	uint64_t sum = 0;

	for (long cpu = 0; cpu < options.cpus; cpu++)
		sum += options.super_packets ? positions[cpu].super_packets : positions[cpu].packets;
	return sum;
}

static void check_time(void)
{
	static double deadline;

	if (!deadline)
		deadline = now_s() + options.seconds;
	if (options.target && now_s() > deadline) {
		fprintf(stderr, "out of time: %lu of %ld packets\n", seen(), options.target);
		exit(3);
	}
}

/* Wait until the gate is open and every ring has room. False when the target is reached. */
static int may_go_on(void)
{
	for (;;) {
		int full = !positions[options.cpus].count;

		if (options.target && seen() >= (uint64_t)options.target)
			return 0;
		for (long ring = 0; ring < options.rings; ring++)
			full |= heads[ring].value - tails[ring].value > (uint64_t)options.limit;
		check_time();
		if (!full)
			return 1;
		usleep(200);
	}
}

/* -- addresses -- */

static socklen_t address_of(const char *text, long port, struct sockaddr_storage *to)
{
	struct sockaddr_in *v4 = (void *)to;
	struct sockaddr_in6 *v6 = (void *)to;

	memset(to, 0, sizeof(*to));
	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(port);
		return sizeof(*v4);
	}
	if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1) {
		errno = EINVAL;
		fail(text);
	}
	v6->sin6_family = AF_INET6;
	v6->sin6_port = htons(port);
	return sizeof(*v6);
}

/* The address `offset` behind; only the last byte changes. */
static void move_address(struct sockaddr_storage *address, int offset)
{
	if (address->ss_family == AF_INET)
		((uint8_t *)&((struct sockaddr_in *)address)->sin_addr)[3] += offset;
	else
		((struct sockaddr_in6 *)address)->sin6_addr.s6_addr[15] += offset;
}

static int open_socket(int family, int type, int protocol)
{
	int fd = socket(family, type, protocol), one = 1, bytes = 8 << 20;

	if (fd < 0)
		fail("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes));
	if (family == AF_INET)
		setsockopt(fd, IPPROTO_IP, IP_FREEBIND, &one, sizeof(one));
	else
		setsockopt(fd, IPPROTO_IPV6, IPV6_FREEBIND, &one, sizeof(one));
	return fd;
}

static void receive_nothing(int fd)
{
	int little = 1;

	setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof(little));
}

/* The socket of a flow: source address and port are the flow's, connected. */
static int flow_socket(long flow, int type, int protocol, long client_port, long port)
{
	struct sockaddr_storage to, from;
	socklen_t bytes = address_of(options.to, port, &to);
	int fd = open_socket(to.ss_family, type, protocol);
	int fragment = to.ss_family == AF_INET ? IP_PMTUDISC_DONT : IPV6_PMTUDISC_DONT;

	address_of(options.from, client_port, &from);
	move_address(&from, flow % options.sources);
	if (bind(fd, (void *)&from, bytes) < 0)
		fail("bind");
	if (type == SOCK_DGRAM && to.ss_family == AF_INET)
		setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &fragment, sizeof(fragment));
	else if (type == SOCK_DGRAM)
		setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &fragment, sizeof(fragment));
	if (connect(fd, (void *)&to, bytes) < 0)
		fail("connect");
	return fd;
}

/* -- the number of a packet: direction and flow, who sent it, and how many that was -- */

static void put_number(uint8_t *to, long bytes, long flow, uint32_t count)
{
	uint8_t number[8] = {options.reverse ? REPLY : 0, flow, getpid() >> 8, getpid()};

	count = htonl(count);
	memcpy(number + 4, &count, 4);
	for (long at = 0; at + 8 <= bytes; at += 8)
		memcpy(to + at, number, 8);
}

static void turn_number(uint8_t *payload, long bytes)
{
	for (long at = 0; at + 8 <= bytes; at += 8)
		payload[at] ^= REPLY;
}

static uint32_t crc32c(const uint8_t *bytes, long count)
{
	static uint32_t table[256];
	uint32_t crc = ~0U;

	if (!table[1]) {
		for (uint32_t i = 0; i < 256; i++) {
			uint32_t value = i;

			for (int bit = 0; bit < 8; bit++)
				value = value & 1 ? value >> 1 ^ 0x82f63b78 : value >> 1;
			table[i] = value;
		}
	}
	while (count--)
		crc = table[(crc ^ *bytes++) & 255] ^ crc >> 8;
	return ~crc;
}

static uint16_t internet_sum(const uint8_t *bytes, long count)
{
	uint32_t sum = 0;

	for (long i = 0; i + 1 < count; i += 2)
		sum += bytes[i] << 8 | bytes[i + 1];
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static void put16(uint8_t *to, uint16_t value)
{
	to[0] = value >> 8;
	to[1] = value;
}

/* SCTP: common header, one DATA chunk. */
static long put_sctp(uint8_t *to, long client_port, long port, long payload)
{
	uint32_t crc;

	put16(to, client_port);
	put16(to + 2, port);
	memset(to + 4, 0, 24);
	to[7] = 1;  /* verification tag */
	to[13] = 3; /* beginning and end of a message */
	put16(to + 14, 16 + payload);
	memset(to + 8, 0, 4);
	crc = crc32c(to, 28 + payload);
	memcpy(to + 8, &crc, 4);
	return 28 + payload;
}

static long put_echo_request(uint8_t *to, int family, long flow, uint32_t count, long payload)
{
	memset(to, 0, 8);
	to[0] = family == AF_INET ? ICMP_ECHO : ICMP6_ECHO_REQUEST;
	put16(to + 4, flow);
	put16(to + 6, count);
	if (family == AF_INET)
		put16(to + 2, internet_sum(to, 8 + payload));
	return 8 + payload;
}

/* -- datagrams -- */

static uint8_t buffers[BATCH][MAX_BYTES];
static struct iovec vectors[BATCH];
static struct sockaddr_storage peers[BATCH];
static struct mmsghdr messages[BATCH];

static void prepare_messages(int with_peers)
{
	for (int i = 0; i < BATCH; i++) {
		vectors[i] = (struct iovec){buffers[i], MAX_BYTES};
		messages[i].msg_hdr.msg_iov = &vectors[i];
		messages[i].msg_hdr.msg_iovlen = 1;
		messages[i].msg_hdr.msg_name = with_peers ? &peers[i] : NULL;
		messages[i].msg_hdr.msg_namelen = with_peers ? sizeof(peers[i]) : 0;
	}
}

/* Have the kernel carry several datagrams, of `segment` bytes each, in one packet: sent, and taken. */
static void use_segments(int fd)
{
	int bytes = options.segment, one = 1;

	if (bytes && (setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT_OPTION, &bytes, sizeof(bytes)) < 0 ||
		      setsockopt(fd, IPPROTO_UDP, UDP_GRO_OPTION, &one, sizeof(one)) < 0))
		fail("segments");
}

static long put_datagram(uint8_t *to, int protocol, int family, long flow, uint32_t *next)
{
	long segment = options.segment ? options.segment : options.bytes;
	uint32_t count = (*next)++;

	switch (protocol) {
	case IPPROTO_UDP:
		put_number(to, segment, flow, count);
		for (long at = segment; at < options.bytes; at += segment)
			put_number(to + at, segment, flow, (*next)++);
		return options.bytes;
	case IPPROTO_SCTP:
		put_number(to + 28, options.bytes, flow, count);
		return put_sctp(to, options.client_port + flow, options.port, options.bytes);
	default:
		put_number(to + 8, options.bytes, flow, count);
		return put_echo_request(to, family, flow, count, options.bytes);
	}
}

static void filter_raw(int fd, int family)
{
	uint32_t none = ~0U;
	struct icmp6_filter none6;

	ICMP6_FILTER_SETBLOCKALL(&none6);
	if (family == AF_INET)
		setsockopt(fd, SOL_RAW, RAW_ICMP_FILTER, &none, sizeof(none));
	else
		setsockopt(fd, IPPROTO_ICMPV6, ICMP6_FILTER, &none6, sizeof(none6));
}

static void send_datagrams(int protocol)
{
	struct sockaddr_storage to;
	int fds[MAX_FLOWS], family, raw = protocol != IPPROTO_UDP;
	uint32_t count = 0;

	address_of(options.to, 0, &to);
	family = to.ss_family;
	if (family == AF_INET6 && protocol == IPPROTO_ICMP)
		protocol = IPPROTO_ICMPV6;
	prepare_messages(0);
	for (long flow = 0; flow < options.flows; flow++) {
		fds[flow] = flow_socket(flow, raw ? SOCK_RAW : SOCK_DGRAM, raw ? protocol : 0,
					raw ? 0 : options.client_port + flow, raw ? 0 : options.port);
		receive_nothing(fds[flow]);
		use_segments(fds[flow]);
		if (raw && protocol != IPPROTO_SCTP)
			filter_raw(fds[flow], family);
	}
	for (long flow = 0; may_go_on(); flow = (flow + 1) % options.flows) {
		for (long i = 0; i < options.burst; i++)
			vectors[i].iov_len = put_datagram(buffers[i], protocol, family, flow, &count);
		/* what is refused here has not been sent, and is not missed: errors of earlier packets come back so */
		sendmmsg(fds[flow], messages, options.burst, 0);
		if (options.pause_us)
			usleep(options.pause_us);
	}
}

/* Send everything back, as a reply. */
static void serve_datagrams(int protocol)
{
	struct sockaddr_storage from;
	int raw = protocol == IPPROTO_SCTP, bytes = 8 << 20;
	socklen_t length = address_of(options.from, raw ? 0 : options.port, &from);
	int fd = open_socket(from.ss_family, raw ? SOCK_RAW : SOCK_DGRAM, raw ? protocol : 0);
	int skip = raw && from.ss_family == AF_INET ? 20 : 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes));
	use_segments(fd);
	if (bind(fd, (void *)&from, length) < 0)
		fail("bind");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int count;

		prepare_messages(1);
		count = recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, NULL);
		for (int i = 0; i < count; i++) {
			uint8_t *payload = buffers[i] + skip;
			long size = messages[i].msg_len - skip;

			vectors[i] = (struct iovec){payload, size};
			if (raw) {
				turn_number(payload + 28, size - 28);
				put_sctp(payload, payload[2] << 8 | payload[3], payload[0] << 8 | payload[1],
					 size - 28);
				if (peers[i].ss_family == AF_INET6)
					((struct sockaddr_in6 *)&peers[i])->sin6_port = 0;
			} else {
				turn_number(payload, size);
			}
		}
		if (count > 0 && options.rings)
			may_go_on();
		for (int done = 0; done < count;) {
			int sent = sendmmsg(fd, messages + done, count - done, 0);

			done += sent > 0 ? sent : 1;
		}
	}
}

/* -- streams -- */

static void set_stream(int fd)
{
	struct linger reset = {1, 0};
	int one = 1, bytes = STREAM_BUFFER;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
	setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
}

/* Write what there is to write and throw away what has come; how many bytes came, -1 at the end. */
static long turn(int fd, long to_write, long *written)
{
	static uint8_t block[STREAM_BUFFER];
	long came;

	*written = to_write > 0 ? send(fd, block, to_write, MSG_DONTWAIT | MSG_NOSIGNAL) : 0;
	if (*written < 0)
		*written = 0;
	came = recv(fd, block, sizeof(block), MSG_DONTWAIT | MSG_TRUNC);
	if (came < 0)
		return errno == EAGAIN ? 0 : -1;
	return came ? came : -1;
}

static void send_streams(void)
{
	struct pollfd fds[MAX_FLOWS];

	for (long flow = 0; flow < options.flows; flow++) {
		fds[flow].fd = flow_socket(flow, SOCK_STREAM, 0, options.client_port + flow, options.port);
		fds[flow].events = POLLIN | POLLOUT;
		set_stream(fds[flow].fd);
	}
	while (may_go_on()) {
		for (long flow = 0; flow < options.flows && may_go_on(); flow++) {
			long written;

			if (turn(fds[flow].fd, options.bytes, &written) < 0)
				fail("a connection ended");
		}
		poll(fds, options.flows, 1);
		if (options.pause_us)
			usleep(options.pause_us);
	}
}

/* As many bytes back as came. */
static void serve_streams(void)
{
	struct pollfd fds[MAX_FLOWS + 1] = {};
	long owed[MAX_FLOWS + 1] = {}, count = 1;
	struct sockaddr_storage from;
	socklen_t length = address_of(options.from, options.port, &from);

	fds[0].fd = open_socket(from.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	fds[0].events = POLLIN;
	set_stream(fds[0].fd);
	if (bind(fds[0].fd, (void *)&from, length) < 0 || listen(fds[0].fd, MAX_FLOWS) < 0)
		fail("bind");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd;

		poll(fds, count, 100);
		while (count <= MAX_FLOWS && (fd = accept(fds[0].fd, NULL, NULL)) >= 0) {
			set_stream(fd);
			fds[count] = (struct pollfd){fd, POLLIN};
			owed[count++] = 0;
		}
		may_go_on();
		for (long i = 1; i < count; i++) {
			long written,
				came = turn(fds[i].fd, owed[i] < options.bytes ? owed[i] : options.bytes, &written);

			owed[i] += came - written;
			fds[i].events = owed[i] > 0 ? POLLIN | POLLOUT : POLLIN;
			if (came < 0) {
				close(fds[i].fd);
				fds[i] = fds[--count];
				owed[i--] = owed[count];
			}
		}
	}
}

/* -- frames with VLAN tags, past the stack -- */

struct frame {
	struct virtio_net_hdr offload;
	uint8_t bytes[MAX_BYTES];
} __attribute__((packed));

static long put_ethernet(uint8_t *to, int family)
{
	long at = 12;

	if (sscanf(options.mac, "%hhx:%hhx:%hhx:%hhx:%hhx:%hhx", to, to + 1, to + 2, to + 3, to + 4, to + 5) != 6)
		fail(options.mac);
	memset(to + 6, 2, 6); /* a locally administered address of the sender */
	for (long tag = 0; tag < options.tags; tag++) {
		put16(to + at, tag + 1 < options.tags ? 0x88a8 : 0x8100);
		put16(to + at + 2, 100 + tag);
		at += 4;
	}
	put16(to + at, family == AF_INET ? 0x0800 : 0x86dd);
	return at + 2;
}

static long put_ip(uint8_t *to, int protocol, const struct sockaddr_storage *from,
		   const struct sockaddr_storage *address, long payload, uint32_t count)
{
	if (address->ss_family == AF_INET) {
		memset(to, 0, 20);
		to[0] = 0x45;
		put16(to + 2, 20 + payload);
		put16(to + 4, count);
		to[8] = 64;
		to[9] = protocol;
		memcpy(to + 12, &((struct sockaddr_in *)from)->sin_addr, 4);
		memcpy(to + 16, &((struct sockaddr_in *)address)->sin_addr, 4);
		put16(to + 10, internet_sum(to, 20));
		return 20;
	}
	memset(to, 0, 40);
	to[0] = 0x60;
	put16(to + 4, payload);
	to[6] = protocol;
	to[7] = 64;
	memcpy(to + 8, &((struct sockaddr_in6 *)from)->sin6_addr, 16);
	memcpy(to + 24, &((struct sockaddr_in6 *)address)->sin6_addr, 16);
	return 40;
}

static long put_ports(uint8_t *to, int protocol, long flow, uint32_t count)
{
	long ours = options.client_port + flow, theirs = options.port;
	long header = protocol == IPPROTO_TCP ? 20 : 8;

	memset(to, 0, header);
	put16(to, options.reverse ? theirs : ours);
	put16(to + 2, options.reverse ? ours : theirs);
	put_number(to + header, options.bytes, flow, count);
	if (protocol == IPPROTO_UDP) {
		put16(to + 4, 8 + options.bytes);
		return header;
	}
	count = htonl(count);
	memcpy(to + 4, &count, 4);
	to[8] = getpid() >> 8;
	to[9] = getpid();
	to[12] = 5 << 4;
	to[13] = 0x10;
	put16(to + 14, 1000);
	return header;
}

static void send_frames(int protocol)
{
	static struct frame frame;
	struct sockaddr_ll device = {.sll_family = AF_PACKET};
	struct sockaddr_storage from, to;
	int fd = socket(AF_PACKET, SOCK_RAW, 0), one = 1, header = protocol == IPPROTO_TCP ? 20 : 8;
	uint32_t count = 0;

	address_of(options.from, 0, &from);
	address_of(options.to, 0, &to);
	device.sll_ifindex = if_nametoindex(options.interface);
	if (bind(fd, (void *)&device, sizeof(device)) < 0 ||
	    setsockopt(fd, SOL_PACKET, PACKET_VNET_HDR, &one, sizeof(one)) < 0)
		fail(options.interface);
	/* at least half of them, for the other way is on its own */
	for (long flow = 0; may_go_on() || count < options.target / 2; flow = (flow + 1) % options.flows) {
		long ip = put_ethernet(frame.bytes, to.ss_family);
		long l4 = ip + put_ip(frame.bytes + ip, protocol, &from, &to, header + options.bytes, count);

		put_ports(frame.bytes + l4, protocol, flow, count++);
		memset(&frame.offload, 0, sizeof(frame.offload));
		if (options.bytes > GSO_SIZE) {
			frame.offload.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM;
			frame.offload.gso_type =
				to.ss_family == AF_INET ? VIRTIO_NET_HDR_GSO_TCPV4 : VIRTIO_NET_HDR_GSO_TCPV6;
			frame.offload.hdr_len = l4 + header;
			frame.offload.gso_size = GSO_SIZE;
			frame.offload.csum_start = l4;
			frame.offload.csum_offset = 16;
		}
		if (send(fd, &frame, sizeof(frame.offload) + l4 + header + options.bytes, 0) < 0 && errno != ENOBUFS)
			fail("send");
		if (options.pause_us)
			usleep(options.pause_us);
	}
}

static int protocol_of(const char *kind)
{
	if (!strcmp(kind, "udp"))
		return IPPROTO_UDP;
	if (!strcmp(kind, "tcp"))
		return IPPROTO_TCP;
	return strcmp(kind, "sctp") ? IPPROTO_ICMP : IPPROTO_SCTP;
}

int main(int count, char **words)
{
	int protocol;

	if (count < 3)
		return 2;
	prctl(PR_SET_PDEATHSIG, 9);
	for (int i = 3; i < count; i++)
		read_option(words[i]);
	positions = pinned(options.positions_path, (options.cpus + 1) * sizeof(*positions));
	if (options.rings) {
		heads = pinned(options.heads_path, options.rings * sizeof(*heads));
		tails = pinned(options.tails_path, options.rings * sizeof(*tails));
	}
	protocol = protocol_of(words[2]);
	if (!strcmp(words[1], "frames"))
		send_frames(protocol);
	else if (!strcmp(words[1], "send") && protocol == IPPROTO_TCP)
		send_streams();
	else if (!strcmp(words[1], "send"))
		send_datagrams(protocol);
	else if (protocol == IPPROTO_TCP)
		serve_streams();
	else
		serve_datagrams(protocol);
	return 0;
}
