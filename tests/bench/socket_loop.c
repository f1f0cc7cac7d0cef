// SPDX-License-Identifier: Apache-2.0
/*
 * socket_loop COUNT: send datagrams to a socket of its own over the loopback interface and take them, 64 at a time, on one
 * CPU. Prints nanoseconds a datagram.
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH 64
#define BYTES 64

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int main(int argc, char **argv)
{
	static char bytes[BATCH][BYTES];
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	struct mmsghdr messages[BATCH] = {};
	struct iovec parts[BATCH];
	socklen_t size = sizeof(address);
	int one = socket(AF_INET, SOCK_DGRAM, 0);
	long left = argc == 2 ? strtol(argv[1], NULL, 10) : 0, count = left;
	int64_t begun;

	for (int i = 0; i < BATCH; i++) {
		parts[i] = (struct iovec){bytes[i], BYTES};
		messages[i].msg_hdr.msg_iov = &parts[i];
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	if (left <= 0 || one < 0 || bind(one, (struct sockaddr *)&address, size) < 0 ||
	    getsockname(one, (struct sockaddr *)&address, &size) < 0 ||
	    connect(one, (struct sockaddr *)&address, size) < 0) {
		perror("socket_loop");
		return 1;
	}
	begun = now_ns();
	for (; left > 0; left -= BATCH)
		if (sendmmsg(one, messages, BATCH, 0) != BATCH || recvmmsg(one, messages, BATCH, 0, NULL) != BATCH) {
			perror("socket_loop");
			return 1;
		}
	printf("%.2f\n", (double)(now_ns() - begun) / count);
	return 0;
}
