//! Rendezvous hashing: every coordinator and agent puts the same nodes in the same order for the same key,
//! and a node that comes or goes moves only what it must (Thaler and Ravishankar, 1998).

use crate::ids::NodeId;

/// The nodes in the order in which they are responsible for `key`.
#[must_use]
pub fn rendezvous(key: &[u8], nodes: impl IntoIterator<Item = NodeId>) -> Vec<NodeId> {
    let seed = fnv1a(key);
    let mut ranked: Vec<(u64, NodeId)> = nodes.into_iter().map(|node| (mix(seed ^ mix(node.0)), node)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|(_, node)| node).collect()
}

/// FNV-1a, 64 bits: stable for ever, unlike the standard library's hasher.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The finalizer of splitmix64 (Steele, Lea and Flood, 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_node_leaves_the_order_of_the_others_and_load_spreads() {
        let mut firsts = [0u32; 6];
        for number in 0..3000u32 {
            let key = number.to_be_bytes();
            let all = rendezvous(&key, (1..=5).map(NodeId));
            firsts[usize::try_from(all[0].0).unwrap()] += 1;
            let without: Vec<_> = all.iter().copied().filter(|node| node.0 != 3).collect();
            assert_eq!(rendezvous(&key, [5, 4, 2, 1].map(NodeId)), without);
        }
        assert!(firsts[1..].iter().all(|count| (450..750).contains(count)), "{firsts:?}");
    }
}
