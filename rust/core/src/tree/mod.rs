//! The prefix tree: runs of tokens, and the pages of the blocks that end in them.
//!
//! One radix tree per namespace, token-granular. A node holds a run of tokens and one page for each
//! block whose *last* token lies in the run, so an inner node may end in the middle of a block; the
//! page of that block then belongs to each of its children:
//!
//! ```text
//! block_size 4          positions 0 1 2 3 4 5 | 6 7 8 9 ...
//! A B C D E F           run of the parent, page of block 0; E F dangle
//!   ├── G H             child one: page of block 1 (E F G H)
//!   └── X Y Z W U V     child two: pages of blocks 1 (E F X Y) and 2 (Z W U V)
//! ```
//!
//! Children are found through one hash table keyed by (parent, first token) and compared token by
//! token, so a hit cannot be a collision and its cost follows bytes, not blocks.
//!
//! A leaf may also end in the middle of a block, with a page of its own for the part: the tail that a
//! closed sequence leaves behind. Whoever goes on from there copies it and fills the block; the tail
//! page is dropped when the leaf grows past it, and stays on as a spare when others stand on it.
//!
//! A leaf counts as far as its pages reach. Tokens beyond them (its child was evicted, or its last
//! pages are in an open plan) are stale: nobody matches them, and whoever writes there trims them.

mod aside;
mod check;
mod cool;
mod cooling;
mod demote;
mod evict;
mod find;
mod index;
mod keep;
mod pin;
mod retain;
mod seal;
mod split;

pub(crate) use demote::Gift;
pub use find::common_prefix;

use std::collections::BTreeSet;

use crate::ids::{Classes, Namespace, NodeId, PageId, STEPS};
use crate::policy::{Lru, Policy, Recency};
use crate::retention::Level;
use aside::Aside;
use cooling::{Cooled, Cooling};
pub(crate) use evict::Victim;
use index::{Children, Roots, Seed};
pub(crate) use seal::Sealing;

#[derive(Default)]
struct Node {
    run: Vec<u32>,
    pages: Vec<PageId>,
    /// Position of the run's first token in the text.
    start: u32,
    parent: NodeId,
    first_child: NodeId,
    next: NodeId,
    previous: NodeId,
    /// Open sequences that stand on this node or below it.
    pins: u32,
    /// Changes whenever something that a plan remembers about the node would no longer be true: it
    /// left the tree, or lost tokens at its end.
    epoch: u32,
    /// What leaves before it, and before what it leaves.
    level: Level,
    /// Nobody pins it, and it does not stand in the order of recency.
    is_aside: bool,
    /// What the pages are beside full precision.
    cooled: Cooled,
}

impl Default for NodeId {
    fn default() -> Self {
        Self::NONE
    }
}

impl Node {
    fn end(&self) -> u32 {
        self.start + self.run.len() as u32
    }

    fn is_leaf(&self) -> bool {
        self.first_child.is_none()
    }

    fn is_root(&self) -> bool {
        self.parent.is_none()
    }
}

/// All namespaces' trees over one slab of nodes.
pub(crate) struct Tree {
    nodes: Vec<Node>,
    vacant: Vec<NodeId>,
    children: Children,
    roots: Roots,
    /// Unpinned nodes by age, those that stand aside left out.
    order: Lru,
    aside: Aside,
    /// Those of them that have pages to give to the class below, by age, for each class.
    cooling: [Cooling; STEPS],
    /// Stamps given out.
    stamps: u64,
    classes: Classes,
    /// Pages that the codec refused, in the class that they are in.
    refused: BTreeSet<PageId>,
    /// Who of them leaves next.
    pub(crate) policy: Box<dyn Policy>,
    /// log2 of the block size.
    shift: u32,
    epochs: u32,
    sealed: usize,
    evictable: usize,
    /// Evictable pages of each of the quantized classes.
    evictable_quantized: [usize; STEPS],
    shared: usize,
}

impl Tree {
    pub(crate) fn new(block_size: u32, classes: Classes) -> Self {
        let seed = Seed::random();
        Self {
            nodes: Vec::new(),
            vacant: Vec::new(),
            children: Children::new(seed),
            roots: Roots::new(seed),
            order: Lru::new(),
            aside: Aside::default(),
            cooling: Default::default(),
            stamps: 0,
            classes,
            refused: BTreeSet::new(),
            policy: Box::new(Recency),
            shift: block_size.trailing_zeros(),
            epochs: 0,
            sealed: 0,
            evictable: 0,
            evictable_quantized: [0; STEPS],
            shared: 0,
        }
    }

    /// Pages in the tree.
    pub(crate) fn num_sealed(&self) -> usize {
        self.sealed
    }

    /// Pages of nodes that nobody pins.
    pub(crate) fn num_evictable(&self) -> usize {
        self.evictable
    }

    /// Pages of nodes with more than one pin.
    pub(crate) fn num_shared(&self) -> usize {
        self.shared
    }

    pub(crate) fn num_nodes(&self) -> usize {
        self.nodes.len() - self.vacant.len()
    }

    /// Bytes owned, token ids not counted.
    pub(crate) fn bytes(&self) -> usize {
        let pages: usize = self.nodes.iter().map(|node| node.pages.capacity()).sum();
        self.nodes.capacity() * size_of::<Node>()
            + pages * size_of::<PageId>()
            + self.vacant.capacity() * size_of::<NodeId>()
            + self.children.bytes()
            + self.roots.bytes()
            + self.order.bytes()
            + self.aside.bytes()
            + self.cooling.iter().map(Cooling::bytes).sum::<usize>()
            + self.policy.bytes()
    }

    /// The root of a namespace, made when there is none.
    pub(crate) fn root(&mut self, namespace: Namespace) -> NodeId {
        if let Some(root) = self.roots.get(namespace) {
            return root;
        }
        let root = self.insert(Node::default());
        self.roots.insert(namespace, root);
        root
    }

    pub(crate) fn find_root(&self, namespace: Namespace) -> Option<NodeId> {
        self.roots.get(namespace)
    }

    fn at(&self, node: NodeId) -> &Node {
        &self.nodes[node.index()]
    }

    fn at_mut(&mut self, node: NodeId) -> &mut Node {
        &mut self.nodes[node.index()]
    }

    /// Where what can be found of a node ends: a leaf reaches as far as its pages.
    fn reach(&self, node: NodeId) -> u32 {
        let it = self.at(node);
        if it.is_leaf() { it.end().min(self.covered(node)) } else { it.end() }
    }

    /// End of the last block that the node has a page for.
    fn covered(&self, node: NodeId) -> u32 {
        let node = self.at(node);
        ((node.start >> self.shift) + node.pages.len() as u32) << self.shift
    }

    /// True when the node's last page holds the beginning of a block.
    fn has_tail(&self, node: NodeId) -> bool {
        self.covered(node) > self.at(node).end()
    }

    /// Round a position up to the end of its block.
    fn block_end(&self, position: u32) -> u32 {
        let mask = (1 << self.shift) - 1;
        (position + mask) & !mask
    }

    fn next_epoch(&mut self) -> u32 {
        self.epochs = self.epochs.wrapping_add(1);
        self.epochs
    }

    /// Put a node into the slab, linked to nothing yet.
    fn insert(&mut self, mut node: Node) -> NodeId {
        node.epoch = self.next_epoch();
        if let Some(id) = self.vacant.pop() {
            self.nodes[id.index()] = node;
            return id;
        }
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node);
        self.order.grow(self.nodes.len());
        id
    }

    /// Give a slot back. The node is linked to nothing any more.
    fn vacate(&mut self, node: NodeId) {
        let epoch = self.next_epoch();
        self.forget_retention(node);
        self.nodes[node.index()] = Node { epoch, ..Node::default() };
        self.vacant.push(node);
    }

    /// Make `node` findable below its parent.
    fn link(&mut self, node: NodeId) {
        let parent = self.at(node).parent;
        let first = std::mem::replace(&mut self.at_mut(parent).first_child, node);
        if first.is_some() {
            self.at_mut(first).previous = node;
        }
        let linked = self.at_mut(node);
        linked.next = first;
        linked.previous = NodeId::NONE;
        self.children.insert(&self.nodes, node);
        self.rank(parent);
    }

    /// The opposite of `link`; `parent` still names the parent.
    fn unlink(&mut self, node: NodeId) {
        self.children.remove(&self.nodes, node);
        let Node { parent, next, previous, .. } = *self.at(node);
        if previous.is_some() {
            self.at_mut(previous).next = next;
        } else {
            self.at_mut(parent).first_child = next;
        }
        if next.is_some() {
            self.at_mut(next).previous = previous;
        }
        self.rank(parent);
    }

    /// Let the policy know where a node stands now: it ranks leaves that may leave.
    fn rank(&mut self, node: NodeId) {
        let it = &self.nodes[node.index()];
        let (level, is_aside) = (it.level, it.is_aside);
        let deepest = if it.pins == 0 && it.is_leaf() && !it.is_root() { it.pages.last() } else { None };
        match level {
            Level::USUAL => self.policy.rank(node, deepest.copied()),
            _ => self.policy.rank_at(level, node, deepest.copied()),
        }
        if is_aside {
            self.stand_aside(node);
        }
    }

    /// Let the policy know that a node leaves the order.
    fn unrank(&mut self, node: NodeId) {
        match self.at(node).level {
            Level::USUAL => self.policy.rank(node, None),
            level => self.policy.rank_at(level, node, None),
        }
    }

    /// Forget the root of an empty namespace that nobody stands on.
    fn drop_root_if_empty(&mut self, root: NodeId) {
        let node = self.at(root);
        if node.is_root() && node.is_leaf() && node.pins == 0 {
            self.roots.remove(root);
            self.vacate(root);
        }
    }
}
