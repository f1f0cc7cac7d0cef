// SPDX-License-Identifier: Apache-2.0
/*
 * Sends datagrams as fast as their receivers take them, and says how many each of them got.
 *
 *   delivery send NETNS ADDRESS PORT COUNT SIZE RECEIVER_NETNS[,RECEIVER_NETNS...] [OPTION...]
 *	sockets=N   as many sockets for each receiver (of a group address: each gets everything)
 *	raw         one raw socket more for each receiver: it gets a clone of every packet
 *	gso=N       N datagrams for a call, which the kernel cuts (UDP_SEGMENT), put together again where it can (UDP_GRO)
 *	trunc       receivers read 8 bytes of each
 *	stamp       the sender asks for transmit timestamps and never reads them: clones in its error queue
 *	rate=N      so many datagrams a second, not as fast as can be
 *	join=NAME   the receivers join the group address on that interface
 *   delivery waste NETNS ADDRESS...
 *	sends to these IPv4 addresses by turns until it is killed
 *
 * At most WINDOW datagrams are under way, so that no queue on the way has a reason to drop one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/net_tstamp.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
#define WINDOW 384
#define BATCH 32
#define MAX_SOCKETS 16
#define MAX_BYTES 65536
#define SILENCE_MS 5000

struct shared {
	volatile unsigned long received[MAX_SOCKETS]; /* the first of each receiver's sockets gates the sender */
	volatile unsigned long ready;
};

static struct sockaddr_storage target;
static socklen_t target_bytes;
static int family, port, sockets = 1, with_raw, segments, truncate_reads, stamp;
static unsigned long count, size, rate;
static const char *join = "";
static struct shared *shared;

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static void enter(const char *path)
{
	int namespace = open(path, O_RDONLY);

	if (namespace < 0 || setns(namespace, CLONE_NEWNET))
		fail(path);
	close(namespace);
}

static void set_target(const char *address)
{
	struct sockaddr_in *four = (void *)&target;
	struct sockaddr_in6 *six = (void *)&target;

	if (inet_pton(AF_INET, address, &four->sin_addr) == 1) {
		family = four->sin_family = AF_INET;
		four->sin_port = htons(port);
		target_bytes = sizeof(*four);
	} else if (inet_pton(AF_INET6, address, &six->sin6_addr) == 1) {
		family = six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		target_bytes = sizeof(*six);
	} else {
		fail(address);
	}
}

static void set(int fd, int level, int option, int value, const char *what)
{
	if (setsockopt(fd, level, option, &value, sizeof(value)))
		fail(what);
}

static int is_group(void)
{
	return family == AF_INET && IN_MULTICAST(ntohl(((struct sockaddr_in *)&target)->sin_addr.s_addr));
}

static int open_receiver(int type, int protocol)
{
	struct sockaddr_in6 any = { .sin6_family = family, .sin6_port = htons(port) };
	int fd = socket(family, type | SOCK_NONBLOCK, protocol);

	if (fd < 0)
		fail("socket");
	set(fd, SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20, "receive buffer");
	if (type == SOCK_RAW)
		return fd;
	set(fd, SOL_SOCKET, SO_REUSEADDR, 1, "reuse");
	if (segments)
		set(fd, IPPROTO_UDP, UDP_GRO, 1, "UDP_GRO");
	/* struct sockaddr_in has its port in the same place */
	if (bind(fd, (struct sockaddr *)&any, target_bytes))
		fail("bind");
	if (is_group()) {
		struct ip_mreqn group = { .imr_multiaddr = ((struct sockaddr_in *)&target)->sin_addr,
					  .imr_ifindex = if_nametoindex(join) };

		if (setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof(group)))
			fail("join");
	}
	return fd;
}

/* Datagrams in one read: more than one where GRO has put them together; 0: a raw read that is not ours. */
static unsigned long datagrams(const struct msghdr *head, const unsigned char *data, long bytes, int raw)
{
	struct cmsghdr *control;

	if (raw) {
		const unsigned char *udp = family == AF_INET ? data + (data[0] & 15) * 4 : data;

		return ((udp[2] << 8) | udp[3]) == port;
	}
	for (control = CMSG_FIRSTHDR(head); control; control = CMSG_NXTHDR((struct msghdr *)head, control))
		if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_GRO) {
			int each = *(int *)CMSG_DATA(control);

			return (bytes + each - 1) / each;
		}
	return 1;
}

static void take(int fd, int raw, volatile unsigned long *received)
{
	static unsigned char data[MAX_BYTES];
	char control[64];

	for (;;) {
		struct iovec to = { data, truncate_reads && !raw ? 8 : sizeof(data) };
		struct msghdr head = { .msg_iov = &to, .msg_iovlen = 1, .msg_control = control,
				       .msg_controllen = sizeof(control) };
		long bytes = recvmsg(fd, &head, 0);

		if (bytes < 0)
			return;
		*received += datagrams(&head, data, bytes, raw);
	}
}

static void receive(const char *namespace, int first)
{
	struct pollfd fds[MAX_SOCKETS];
	int number = sockets + with_raw;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	enter(namespace);
	for (int i = 0; i < sockets; i++)
		fds[i] = (struct pollfd){ .fd = open_receiver(SOCK_DGRAM, 0), .events = POLLIN };
	if (with_raw)
		fds[sockets] = (struct pollfd){ .fd = open_receiver(SOCK_RAW, IPPROTO_UDP), .events = POLLIN };
	__sync_fetch_and_add(&shared->ready, 1);
	for (;;) {
		int complete = 1;

		for (int i = 0; i < number; i++)
			complete &= shared->received[first + i] >= count;
		if (complete || poll(fds, number, SILENCE_MS) <= 0)
			exit(0);
		for (int i = 0; i < number; i++)
			if (fds[i].revents)
				take(fds[i].fd, i >= sockets, &shared->received[first + i]);
	}
}

static int open_sender(void)
{
	int fd = socket(family, SOCK_DGRAM, 0);

	if (fd < 0)
		fail("socket");
	set(fd, SOL_SOCKET, SO_BROADCAST, 1, "broadcast");
	if (segments)
		set(fd, IPPROTO_UDP, UDP_SEGMENT, size, "UDP_SEGMENT");
	if (stamp)
		set(fd, SOL_SOCKET, SO_TIMESTAMPING,
		    SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_TX_SCHED | SOF_TIMESTAMPING_SOFTWARE, "stamp");
	return fd;
}

/* False if the receivers have given up: something was lost. */
static int wait_for_room(unsigned long sent, int receivers)
{
	struct timespec pause = { 0, 20000 };
	int number = sockets + with_raw;

	for (int waited = 0; waited < SILENCE_MS * 10; waited++) {
		unsigned long least = sent;

		for (int i = 0; i < receivers * number; i++)
			if (shared->received[i] < least)
				least = shared->received[i];
		if (sent - least < WINDOW)
			return 1;
		nanosleep(&pause, NULL);
	}
	return 0;
}

static double seconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec + now.tv_nsec * 1e-9;
}

static void wait_until_due(unsigned long sent, double begun)
{
	struct timespec pause = { 0, 50000 };

	while (rate && sent > (seconds() - begun) * rate)
		nanosleep(&pause, NULL);
}

static unsigned long transmit(int receivers)
{
	static char data[MAX_BYTES];
	struct mmsghdr heads[BATCH];
	struct iovec content = { data, size * (segments ? segments : 1) };
	unsigned long each = segments ? segments : 1, sent = 0;
	double begun = seconds();
	int fd = open_sender();

	for (int i = 0; i < BATCH; i++)
		heads[i] = (struct mmsghdr){ .msg_hdr = { .msg_name = &target, .msg_namelen = target_bytes,
							  .msg_iov = &content, .msg_iovlen = 1 } };
	while (sent < count) {
		int batch = segments ? 1 : BATCH, done;

		if ((unsigned long)batch * each > count - sent)
			batch = (count - sent) / each;
		wait_until_due(sent, begun);
		if (!wait_for_room(sent, receivers))
			break;
		done = sendmmsg(fd, heads, batch, 0);
		if (done < 0 && errno != ENOBUFS && errno != EAGAIN)
			fail("send");
		if (done > 0)
			sent += done * each;
	}
	return sent;
}

static void waste(const char *namespace, int addresses, char **address)
{
	struct mmsghdr heads[BATCH];
	static char data[64];
	struct iovec content = { data, sizeof(data) };
	int fd;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	enter(namespace);
	port = 9;
	fd = socket(AF_INET, SOCK_DGRAM, 0);
	for (int i = 0; i < BATCH; i++)
		heads[i] = (struct mmsghdr){ .msg_hdr = { .msg_name = &target, .msg_namelen = sizeof(target),
							  .msg_iov = &content, .msg_iovlen = 1 } };
	for (int i = 0;; i = (i + 1) % addresses) {
		set_target(address[i]);
		sendmmsg(fd, heads, BATCH, 0);
	}
}

static void options(int argc, char **argv)
{
	for (int i = 0; i < argc; i++) {
		if (!strncmp(argv[i], "sockets=", 8))
			sockets = atoi(argv[i] + 8);
		else if (!strncmp(argv[i], "gso=", 4))
			segments = atoi(argv[i] + 4);
		else if (!strncmp(argv[i], "rate=", 5))
			rate = strtoul(argv[i] + 5, NULL, 10);
		else if (!strncmp(argv[i], "join=", 5))
			join = argv[i] + 5;
		else if (!strcmp(argv[i], "raw"))
			with_raw = 1;
		else if (!strcmp(argv[i], "trunc"))
			truncate_reads = 1;
		else if (!strcmp(argv[i], "stamp"))
			stamp = 1;
		else
			fail(argv[i]);
	}
}

int main(int argc, char **argv)
{
	int receivers = 0, number;
	unsigned long sent;
	char *name;

	if (argc > 3 && !strcmp(argv[1], "waste"))
		waste(argv[2], argc - 3, argv + 3);
	if (argc < 8)
		return 2;
	port = atoi(argv[4]);
	count = strtoul(argv[5], NULL, 10);
	size = strtoul(argv[6], NULL, 10);
	set_target(argv[3]);
	options(argc - 8, argv + 8);
	number = sockets + with_raw;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (name = strtok(argv[7], ","); name; name = strtok(NULL, ","), receivers++)
		if (!fork())
			receive(name, receivers * number);
	while (shared->ready < (unsigned long)receivers)
		if (waitpid(-1, NULL, WNOHANG) > 0)
			return 1;
	enter(argv[2]);
	sent = transmit(receivers);
	while (wait(NULL) > 0)
		;
	printf("%lu", sent);
	for (int i = 0; i < receivers * number; i++)
		printf(" %lu", shared->received[i]);
	printf("\n");
	return 0;
}
