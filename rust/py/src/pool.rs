//! `PagePool`, and the lock that its sequences, batches and plans share.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvhybrid_core::{Adaptive, Held, Left, Namespace, OpenOptions, Pool, Rule, SequenceId};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::buffers::{with_int64, with_tokens};
use crate::errors::{poisoned, raised};
use crate::ordered::{Order, Rank};
use crate::pin::Pin;
use crate::plan::Plan;
use crate::retention::{microseconds, retention};
use crate::sequence::Sequence;

/// The core behind its lock. It is held for bookkeeping only: nobody attaches to Python while holding it, and no Python
/// object is made or dropped, which could collect garbage, and with it handles that ask for the same lock.
pub struct Shared(kvhybrid_core::Shared<Pool>);

impl Shared {
    pub fn new(pool: Pool) -> Self {
        Self(kvhybrid_core::Shared::new(pool))
    }

    pub fn lock(&self) -> PyResult<HeldPool<'_>> {
        let order = Order::enter(Rank::Pool);
        Ok(HeldPool { inner: self.0.lock().map_err(poisoned)?, _order: order })
    }

    /// Have the pool carry out what a handle leaves behind. Never waits: finalizers run in the middle of whatever their
    /// thread does.
    pub fn leave(&self, left: Left) {
        self.0.leave(left);
    }

    /// Close a sequence; and when it is time to learn from what was used, do that in a thread of its own:
    /// the lock is held for a copy of what there is to learn from, and nobody waits.
    pub fn close(self: &Arc<Self>, id: SequenceId) -> PyResult<()> {
        let mut pool = self.lock()?;
        pool.close(id);
        let lesson = pool.lesson();
        drop(pool);
        if let Some(mut lesson) = lesson {
            let shared = Arc::downgrade(self);
            let learn = move || {
                lesson.learn();
                if let Some(shared) = shared.upgrade()
                    && let Ok(mut pool) = shared.lock()
                {
                    pool.apply(lesson);
                }
            };
            // Without a thread there is no lesson this time: pages leave in the order learned before.
            let _ = thread::Builder::new().name("kvhybrid-learn".into()).spawn(learn);
        }
        Ok(())
    }
}

/// A pool, for as long as this lives.
pub struct HeldPool<'a> {
    inner: Held<'a, Pool>,
    _order: Order,
}

impl Deref for HeldPool<'_> {
    type Target = Pool;

    fn deref(&self) -> &Pool {
        &self.inner
    }
}

impl DerefMut for HeldPool<'_> {
    fn deref_mut(&mut self) -> &mut Pool {
        &mut self.inner
    }
}

/// Set who must leave first: recency, or the learned order, with its guard or, to compare, without.
pub fn set_policy(pool: &mut Pool, policy: &str, options: Adaptive) -> PyResult<()> {
    match policy {
        "lru" | "paged" => {}
        "adaptive" => pool.adapt(options),
        "survival" => pool.adapt(Adaptive { is_unguarded: true, ..options }),
        _ => {
            let message = format!("policy must be 'lru', 'paged', 'adaptive' or 'survival', not '{policy}'");
            return Err(PyValueError::new_err(message));
        }
    }
    Ok(())
}

/// Who rules in a pool, and by how much.
pub fn rule(py: Python<'_>, rule: Option<Rule>) -> PyResult<Bound<'_, PyDict>> {
    let items = PyDict::new(py);
    items.set_item("ruling", if rule.is_some_and(|rule| rule.is_learned) { "survival" } else { "lru" })?;
    if let Some(rule) = rule {
        items.set_item("shadow_hit_rate_lru", rule.recency)?;
        items.set_item("shadow_hit_rate_survival", rule.learned)?;
        items.set_item("rule_changes", rule.switches)?;
        items.set_item("lessons", rule.lessons)?;
    }
    Ok(items)
}

#[pyclass(frozen, module = "kvhybrid._core")]
pub struct PagePool {
    pub shared: Arc<Shared>,
    num_pages: usize,
    num_quantized: usize,
    num_lowest: usize,
    block_size: usize,
}

#[pymethods]
impl PagePool {
    #[new]
    #[allow(clippy::too_many_arguments)] // named, from Python
    #[pyo3(signature = (num_pages, block_size, *, num_quantized = 0, num_lowest = 0, keep_tails = true, policy = "lru", seed = None, max_pinned_share = 0.5))]
    fn new(
        num_pages: usize,
        block_size: usize,
        num_quantized: usize,
        num_lowest: usize,
        keep_tails: bool,
        policy: &str,
        seed: Option<u64>,
        max_pinned_share: f64,
    ) -> PyResult<Self> {
        let Some(above) = num_quantized.checked_sub(num_lowest) else {
            let message = format!("num_lowest={num_lowest} are part of num_quantized={num_quantized}");
            return Err(PyValueError::new_err(message));
        };
        let mut pool = Pool::with_classes([num_pages, above, num_lowest], block_size, keep_tails).map_err(raised)?;
        let options = Adaptive { seed, token_weight: 1, learns_at_once: false, is_unguarded: false };
        set_policy(&mut pool, policy, options)?;
        pool.bound_pins(max_pinned_share).map_err(raised)?;
        let num_pages = pool.num_pages();
        Ok(Self { shared: Arc::new(Shared::new(pool)), num_pages, num_quantized, num_lowest, block_size })
    }

    fn __repr__(&self) -> PyResult<String> {
        let pool = self.shared.lock()?;
        Ok(format!(
            "PagePool({} pages of {} tokens, {} free, {} evictable)",
            self.num_pages,
            self.block_size,
            pool.num_free(),
            pool.num_evictable()
        ))
    }

    #[getter]
    fn num_pages(&self) -> usize {
        self.num_pages
    }

    #[getter]
    fn num_quantized(&self) -> usize {
        self.num_quantized
    }

    #[getter]
    fn num_lowest(&self) -> usize {
        self.num_lowest
    }

    #[getter]
    fn block_size(&self) -> usize {
        self.block_size
    }

    #[getter]
    fn num_free(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.num_free())
    }

    #[getter]
    fn num_free_quantized(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.num_free_quantized())
    }

    #[getter]
    fn num_evictable(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.num_evictable())
    }

    #[pyo3(name = "match", signature = (tokens, namespace = 0))]
    fn matched(&self, tokens: &Bound<'_, PyAny>, namespace: u64) -> PyResult<usize> {
        with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(pool) => pool.matched(Namespace(namespace), tokens).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })?
    }

    #[pyo3(signature = (tokens, namespace = 0, *, reuse = true, share = true, align = 1))]
    fn open(
        &self,
        tokens: &Bound<'_, PyAny>,
        namespace: u64,
        reuse: bool,
        share: bool,
        align: usize,
    ) -> PyResult<Sequence> {
        let options = OpenOptions { namespace: Namespace(namespace), reuse, share, align };
        let opened = with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(mut pool) => pool.open(tokens, options).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })?;
        let (id, cached) = opened?;
        Ok(Sequence::new(self.shared.clone(), id, cached))
    }

    #[allow(clippy::too_many_arguments)] // named, from Python
    #[pyo3(signature = (tokens, namespace = 0, *, start = 0, stop = None, priority = 0, ttl_s = None, lapses = false))]
    fn retain(
        &self,
        tokens: &Bound<'_, PyAny>,
        namespace: u64,
        start: usize,
        stop: Option<usize>,
        priority: i32,
        ttl_s: Option<f64>,
        lapses: bool,
    ) -> PyResult<usize> {
        let retention = retention(priority, ttl_s, lapses)?;
        let range = start..stop.unwrap_or(usize::MAX);
        with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(mut pool) => pool.retain(Namespace(namespace), tokens, range, retention).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })?
    }

    #[pyo3(signature = (tokens, namespace = 0, *, ttl_s = None))]
    fn pin(&self, tokens: &Bound<'_, PyAny>, namespace: u64, ttl_s: Option<f64>) -> PyResult<Pin> {
        let ttl = microseconds(ttl_s)?;
        let (id, held) = with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(mut pool) => pool.pin(Namespace(namespace), tokens, ttl).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })??;
        Ok(Pin::new(self.shared.clone(), id, held))
    }

    #[pyo3(signature = (tokens, namespace = 0, *, most_pages))]
    fn hint(&self, tokens: &Bound<'_, PyAny>, namespace: u64, most_pages: usize) -> PyResult<Option<Pin>> {
        let hint = with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(mut pool) => pool.hint(Namespace(namespace), tokens, most_pages).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })??;
        Ok(hint.map(|(id, held)| Pin::new(self.shared.clone(), id, held)))
    }

    fn demote(&self, num_pages: usize) -> PyResult<Plan> {
        let plan = self.shared.lock()?.plan_demotion(num_pages).map_err(raised)?;
        Ok(Plan::new(self.shared.clone(), plan))
    }

    fn rule<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let found = self.shared.lock()?.rule();
        rule(py, found)
    }

    #[pyo3(signature = (tokens, namespace = 0))]
    fn explain<'py>(&self, tokens: &Bound<'py, PyAny>, namespace: u64) -> PyResult<Bound<'py, PyDict>> {
        let explained = with_tokens(tokens, |tokens| match self.shared.lock() {
            Ok(pool) => pool.explain(Namespace(namespace), tokens).map(Ok),
            Err(poisoned) => Ok(Err(poisoned)),
        })??;
        let items = PyDict::new(tokens.py());
        items.set_item("cached", explained.cached)?;
        items.set_item("evicted", explained.evicted)?;
        items.set_item("unseen", explained.unseen)?;
        items.set_item("evicted_by", explained.left.map(|(cause, _)| cause.name()))?;
        items.set_item("evicted_s_ago", explained.left.map(|(_, ago)| Duration::from_micros(ago).as_secs_f64()))?;
        Ok(items)
    }

    fn set_time(&self, microseconds: u64) -> PyResult<()> {
        self.shared.lock()?.set_time(microseconds);
        Ok(())
    }

    fn evict(&self, num_pages: usize) -> PyResult<usize> {
        Ok(self.shared.lock()?.evict(num_pages))
    }

    fn which_exist<'py>(&self, py: Python<'py>, namespaces: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let found: Vec<u8> = with_int64("namespaces", namespaces, |numbers| {
            let pool = self.shared.lock()?;
            let exists = |number: &i64| u8::from(pool.has_namespace(Namespace(number.cast_unsigned())));
            Ok(numbers.iter().map(exists).collect())
        })?;
        Ok(PyBytes::new(py, &found))
    }

    fn drop(&self, namespace: u64) -> PyResult<usize> {
        Ok(self.shared.lock()?.drop_namespace(Namespace(namespace)))
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let statistics = self.shared.lock()?.statistics();
        let items = PyDict::new(py);
        for (name, value) in statistics.items() {
            items.set_item(name, value)?;
        }
        Ok(items)
    }

    fn bookkeeping_bytes(&self) -> PyResult<usize> {
        Ok(self.shared.lock()?.bytes())
    }

    fn check(&self) -> PyResult<()> {
        self.shared.lock()?.check().map_err(raised)
    }
}
