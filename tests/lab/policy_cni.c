// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
/*
 * A stand-in for a CNI with endpoint routes: a program on the egress hook of a pod's interface that drops what a policy
 * denies, UDP and TCP to DENIED_PORT.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>

#define ETHERNET_BYTES 14
#define ETHERTYPE_IPV4 0x0800
#define PROTO_TCP 6
#define PROTO_UDP 17

int cni_to_pod(struct __sk_buff *skb)
{
	bool is_ipv4 = skb->protocol == bpf_htons(ETHERTYPE_IPV4);
	__u32 protocol_at = ETHERNET_BYTES + (is_ipv4 ? 9 : 6), transport_at = ETHERNET_BYTES + (is_ipv4 ? 20 : 40);
	__be16 port = 0;
	__u8 protocol = 0;

	bpf_skb_load_bytes(skb, protocol_at, &protocol, 1);
	bpf_skb_load_bytes(skb, transport_at + 2, &port, 2);
	if ((protocol == PROTO_TCP || protocol == PROTO_UDP) && port == bpf_htons(DENIED_PORT))
		return TC_ACT_SHOT;
	return TC_ACT_OK;
}
