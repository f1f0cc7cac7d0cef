/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Included before everything else by bcc: what its prelude needs of a kernel tree, and the kernel's short words. */
#pragma once
#define CONFIG_BPF_SYSCALL 1
#include "/usr/include/linux/types.h"

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
typedef unsigned long size_t;
typedef unsigned long uintptr_t;

/* named by bcc's prelude, used by none of our programs */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8;
	unsigned long ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};

#define true 1
#define false 0
#define NULL ((void *)0)
#define inline inline __attribute__((always_inline))
/* what is unlikely is placed behind the rest: the programs are large, and the instruction cache is the kernel's as well */
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define barrier() asm volatile("" ::: "memory")
#define READ_ONCE(x) (*(const volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, v) (*(volatile typeof(x) *)&(x) = (v))
