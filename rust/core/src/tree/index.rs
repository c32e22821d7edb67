//! Two hash tables: the child of a node by its first token, and the root of a namespace.

use std::hash::{BuildHasher, Hasher, RandomState};

use hashbrown::{HashMap, HashTable};

use super::Node;
use crate::ids::{Namespace, NodeId};

/// Secret of this tree's hashes. Tokens and namespaces are the users' choice, so an unseeded mix
/// would let them choose collisions.
#[derive(Clone, Copy)]
pub(super) struct Seed([u64; 2]);

impl Seed {
    pub(super) fn random() -> Self {
        let draw = || RandomState::new().hash_one(0u8);
        Self([draw(), draw() | 1])
    }

    /// Fold the 128-bit product: every input bit reaches both ends of the result.
    fn mix(self, key: u64) -> u64 {
        let product = u128::from(key ^ self.0[0]) * u128::from(self.0[1] ^ key.rotate_left(32));
        (product as u64) ^ ((product >> 64) as u64)
    }

    fn child(self, parent: NodeId, token: u32) -> u64 {
        self.mix(u64::from(parent.0) << 32 | u64::from(token))
    }
}

/// (parent, first token) to child. The table stores ids only; the key is read from the node.
pub(super) struct Children {
    table: HashTable<NodeId>,
    seed: Seed,
}

impl Children {
    pub(super) fn new(seed: Seed) -> Self {
        Self { table: HashTable::new(), seed }
    }

    pub(super) fn bytes(&self) -> usize {
        self.table.allocation_size()
    }

    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    pub(super) fn get(&self, nodes: &[Node], parent: NodeId, token: u32) -> Option<NodeId> {
        let hash = self.seed.child(parent, token);
        let is_it = |id: &NodeId| {
            let node = &nodes[id.index()];
            node.parent == parent && node.run[0] == token
        };
        self.table.find(hash, is_it).copied()
    }

    pub(super) fn insert(&mut self, nodes: &[Node], node: NodeId) {
        let seed = self.seed;
        let hash = |id: &NodeId| {
            let node = &nodes[id.index()];
            seed.child(node.parent, node.run[0])
        };
        self.table.insert_unique(hash(&node), node, hash);
    }

    pub(super) fn remove(&mut self, nodes: &[Node], node: NodeId) {
        let Node { parent, ref run, .. } = nodes[node.index()];
        let hash = self.seed.child(parent, run[0]);
        if let Ok(entry) = self.table.find_entry(hash, |id| *id == node) {
            entry.remove();
        }
    }
}

/// Namespaces that have a tree.
pub(super) struct Roots {
    by_namespace: HashMap<Namespace, NodeId, Mixed>,
    by_root: HashMap<NodeId, Namespace, Mixed>,
}

impl Roots {
    pub(super) fn new(seed: Seed) -> Self {
        let hasher = Mixed(seed);
        Self { by_namespace: HashMap::with_hasher(hasher.clone()), by_root: HashMap::with_hasher(hasher) }
    }

    pub(super) fn bytes(&self) -> usize {
        self.by_namespace.allocation_size() + self.by_root.allocation_size()
    }

    pub(super) fn get(&self, namespace: Namespace) -> Option<NodeId> {
        self.by_namespace.get(&namespace).copied()
    }

    pub(super) fn insert(&mut self, namespace: Namespace, root: NodeId) {
        self.by_namespace.insert(namespace, root);
        self.by_root.insert(root, namespace);
    }

    pub(super) fn remove(&mut self, root: NodeId) {
        if let Some(namespace) = self.by_root.remove(&root) {
            self.by_namespace.remove(&namespace);
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.by_namespace.values().copied()
    }
}

#[derive(Clone)]
struct Mixed(Seed);

impl BuildHasher for Mixed {
    type Hasher = MixedHasher;

    fn build_hasher(&self) -> MixedHasher {
        MixedHasher { seed: self.0, state: 0 }
    }
}

struct MixedHasher {
    seed: Seed,
    state: u64,
}

impl Hasher for MixedHasher {
    fn finish(&self) -> u64 {
        self.state
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.state = self.seed.mix(self.state ^ value);
    }
}
