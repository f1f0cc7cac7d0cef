/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fill a report ring as bpf/report.h does: take a sequence number, look for room, write the record, hand it over.
 *
 * export_producer MAPS RING COUNT RATE LENGTH...
 *
 * RATE 0: wait for room, lose nothing. Else so many reports a second, after a beginning at a tenth of that rate, and what
 * finds no room is lost. Each report is as long as one of the lengths says, drawn at random. Prints JSON.
 */
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "types.h"

#define HEADER_BYTES 28
#define MAX_LENGTHS 16
#define SECOND_NS 1000000000ULL
/* records between two looks at the clock */
#define BURST 16
/* the beginning: this part of a second's reports, at this part of the rate */
#define WARM_UP_SHARE 20
#define WARM_UP_SLOWER 10
/* a burst of this long is let pass */
#define TOLERATED_NS 1000000

struct ring {
	struct report_record *records;
	struct report_iov *iovs;
	__u64 *collectors;
	__u64 *sequence;
	__u64 *head;
	__u64 *tail;
	__u32 size;
	__u32 number;
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void *map(const char *directory, const char *name, size_t value_bytes, __u32 *max_entries)
{
	char path[4096];
	struct bpf_map_info info = {};
	union bpf_attr attr = {};
	size_t bytes;
	void *memory;
	int fd;

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	attr.pathname = (__u64)(unsigned long)path;
	fd = syscall(SYS_bpf, BPF_OBJ_GET, &attr, sizeof(attr));
	if (fd < 0)
		fail(path);
	memset(&attr, 0, sizeof(attr));
	attr.info.bpf_fd = fd;
	attr.info.info_len = sizeof(info);
	attr.info.info = (__u64)(unsigned long)&info;
	if (syscall(SYS_bpf, BPF_OBJ_GET_INFO_BY_FD, &attr, sizeof(attr)))
		fail(path);
	*max_entries = info.max_entries;
	bytes = (value_bytes * info.max_entries + 4095) & ~4095UL;
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED)
		fail(path);
	close(fd);
	return memory;
}

static struct ring open_ring(const char *maps, __u32 number)
{
	struct ring ring = { .number = number };
	struct ring_position *heads, *tails;
	__u32 rings, records, ignored;
	__u64 *sequences;

	sequences = map(maps, "sequences", sizeof(*sequences), &ignored);
	heads = map(maps, "ring_heads", sizeof(*heads), &rings);
	tails = map(maps, "ring_tails", sizeof(*tails), &rings);
	ring.collectors = map(maps, "report_collectors", sizeof(*ring.collectors), &records);
	ring.iovs = map(maps, "report_iovs", sizeof(*ring.iovs), &records);
	ring.records = map(maps, "report_records", sizeof(*ring.records), &records);
	ring.sequence = &sequences[number * MAX_COLLECTORS];
	ring.head = &heads[number].value;
	ring.tail = &tails[number].value;
	ring.size = records / rings;
	return ring;
}

static __u64 now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * SECOND_NS + now.tv_nsec;
}

static __u64 waiting(const struct ring *ring)
{
	return *ring->head - __atomic_load_n(ring->tail, __ATOMIC_ACQUIRE);
}

/* When the report with this number is due, since the beginning. */
static __u64 due_ns(__u64 report, __u64 rate)
{
	__u64 warm_up = rate / WARM_UP_SHARE;

	if (report < warm_up)
		return report * SECOND_NS * WARM_UP_SLOWER / rate;
	return SECOND_NS * WARM_UP_SLOWER / WARM_UP_SHARE + (report - warm_up) * SECOND_NS / rate;
}

/* Wait; returns by how much it is too late already. What was missed is not caught up with: that would be another rate. */
static __u64 wait_until(__u64 then)
{
	__u64 now;

	while ((now = now_ns()) < then)
		;
	return now - then > TOLERATED_NS ? now - then : 0;
}

static void write_report(struct ring *ring, __u32 length)
{
	static const __u8 packet[SNAP_BYTES] = { 0x02, 0x5a };
	__u64 head = *ring->head;
	__u32 index = ring->number * ring->size + (head & (ring->size - 1));
	__u32 header[HEADER_BYTES / sizeof(__u32)] = {
		__builtin_bswap32(0x02200000 | ring->number),
		__builtin_bswap32(*ring->sequence),
	};

	ring->collectors[index] = 0;
	memcpy(ring->records[index].bytes, header, HEADER_BYTES);
	memcpy(ring->records[index].bytes + HEADER_BYTES, packet, length - HEADER_BYTES);
	ring->iovs[index].len = length;
	__atomic_store_n(ring->head, head + 1, __ATOMIC_RELEASE);
}

static __u32 next_random(__u32 *state)
{
	*state ^= *state << 13;
	*state ^= *state >> 17;
	*state ^= *state << 5;
	return *state;
}

int main(int argc, char **argv)
{
	__u32 lengths[MAX_LENGTHS], kinds = argc - 5, random = 2463534242, length, i;
	__u64 count, rate, begin, end, done, late = 0, full = 0, bytes = 0;
	struct ring ring;

	if (argc < 6 || kinds > MAX_LENGTHS)
		return 2;
	for (i = 0; i < kinds; i++)
		lengths[i] = atoi(argv[5 + i]);
	ring = open_ring(argv[1], atoi(argv[2]));
	count = strtoull(argv[3], NULL, 10);
	rate = strtoull(argv[4], NULL, 10);
	/* the exporter is woken now: no program of the kernel writes here, so nobody rings the bell */
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		return 1;
	begin = now_ns();
	for (done = 0; done < count; done++) {
		if (rate && done % BURST == 0)
			late += wait_until(begin + late + due_ns(done, rate));
		++*ring.sequence;
		if (!rate)
			while (waiting(&ring) >= ring.size)
				;
		if (waiting(&ring) >= ring.size) {
			full++;
			continue;
		}
		length = lengths[kinds > 1 ? next_random(&random) % kinds : 0];
		write_report(&ring, length);
		bytes += length;
	}
	end = now_ns();
	printf("{\"written\": %llu, \"full\": %llu, \"bytes\": %llu, \"left\": %llu, \"ns\": %llu}\n",
	       count - full, full, bytes, waiting(&ring), end - begin);
	return 0;
}
