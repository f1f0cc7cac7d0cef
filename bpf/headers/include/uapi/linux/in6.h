/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
#include "/usr/include/linux/in6.h"
